"""The command line: flags, one-line errors, exit codes, logs on standard output."""

import argparse
import contextlib
import difflib
import io
import logging
import signal
import sys
import time
import traceback

from bivl.core import config as configs
from bivl.core import distributed
from bivl.core.errors import GuardStop, Late, Terminated, UserError

log = logging.getLogger("bivl")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def parse(argv, description: str, flags: dict[str, dict], base=None):
    """-> (namespace, config or None). `flags` maps names to argparse keywords.

    `--config=FILE.py:options` loads a config and `--config.a.b=value` overrides it. Without
    --config the overrides apply to `base(namespace, keys)`, the config saved with a checkpoint,
    say; `keys` are the dotted keys that will be overridden.
    """
    parser = _Parser(description=description, allow_abbrev=False)
    for name, keywords in flags.items():
        parser.add_argument(name, **keywords)
    parser.add_argument("--config", metavar="FILE.py:options", help="recipe under configs/")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args, rest = parser.parse_known_args(argv)
    assignments = _assignments(rest, [*flags, "--config", "--debug", "--config.KEY"])
    if args.config:
        config = configs.load(args.config)
    elif base is not None:
        config = base(args, [key for key, _ in assignments])
    else:
        raise UserError("--config is missing; pass --config=configs/....py")
    configs.override(config, assignments)
    return args, config


def _assignments(words, known: list[str]) -> list[tuple[str, str]]:
    """Words that argparse left -> (KEY, TEXT) of each --config.KEY=TEXT or --config.KEY TEXT."""
    found, words = [], iter(words)
    for word in words:
        name, equals, value = word.partition("=")
        if not name.startswith("--config."):
            close = difflib.get_close_matches(name, known, 1)
            cure = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise UserError(f"flag {name} is unknown; {cure}")
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise UserError(f"flag {name} has no value; write {name}=VALUE")
        found.append((name.removeprefix("--config."), value))
    return found


def show_logs() -> None:
    """What bivl has to say goes to standard output, plainly; in a notebook too."""
    logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format="%(message)s", force=True)
    log.setLevel(logging.INFO)


def run(main, argv=None) -> None:
    """Runs `main(argv)` and exits: 0 done, 2 bad input, 3 guard, 143 SIGTERM, 1 anything else.

    What starts runs again (docs/pods.md) does so after 1 and 143.
    """
    argv = sys.argv[1:] if argv is None else argv
    show_logs()
    codes = {UserError: 2, Late: 1, GuardStop: 3, Terminated: 143, KeyboardInterrupt: 130}
    try:
        main(argv)
    except tuple(codes) as error:
        if "--debug" in argv:
            traceback.print_exc()
        line = " ".join(str(error).split()) or "interrupted"
        kind, code = next(item for item in codes.items() if isinstance(error, item[0]))
        line = {UserError: "error: ", Late: "failed: "}.get(kind, "") + line
        _say_last(line)
        if not isinstance(error, (GuardStop, Terminated)):  # to which all come, late perhaps
            distributed.failed(line, code)
        sys.exit(code)
    except Exception as error:
        traceback.print_exc()
        line = f"{type(error).__name__}: {' '.join(str(error).split())}"
        distributed.failed(line, 1, ask=True)
        _say_last(f"failed: {line}")
        distributed.failed(line, 1)
        sys.exit(1)


def _say_last(line: str) -> None:
    """The last line on standard error; what threads of libraries still report is dropped.

    Nor may a log on the disk that is full change the exit code, as a failing flush at exit would.
    """
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    errors = sys.stderr
    sys.stdout = sys.stderr = io.StringIO()
    time.sleep(0.1)  # a thread that is writing now ends first
    with contextlib.suppress(OSError):
        print(line, file=errors, flush=True)


class Termination:
    """SIGTERM seen as a flag by the training loop, or as an exception inside `interruptible`."""

    def __init__(self, install: bool = True):
        """`install` is False where several processes agree through jax's preemption service."""
        self.requested = self._raise = False
        self._old = signal.signal(signal.SIGTERM, self._handle) if install else None

    def _handle(self, signum, frame):
        self.requested = True
        if self._raise:
            raise Terminated("SIGTERM")

    @contextlib.contextmanager
    def interruptible(self):
        """SIGTERM ends the block at once, with Terminated."""
        self._raise = True
        try:
            if self.requested:
                raise Terminated("SIGTERM")
            yield
        finally:
            self._raise = False

    def close(self):
        """Puts the earlier handler back."""
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)
