"""Exit codes, the one line on standard error, flags."""

import logging
import os
import signal

import pytest
from ml_collections import ConfigDict

from bivl.core import cli
from bivl.core import config as configs
from bivl.core.errors import GuardStop, Late, Terminated, UserError


@pytest.fixture
def command(capsys):
    """command(main, argv) -> (exit code, standard output, standard error)."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(main, argv=()):
        code = 0
        try:
            cli.run(main, list(argv))
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    yield run
    root.handlers[:] = handlers
    root.setLevel(level)


def fail(error):
    def main(argv):
        raise error

    return main


def test_success_is_silent(command):
    assert command(lambda argv: None) == (0, "", "")


class Sub(UserError):
    pass


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("cause; cure"), 2, "error: cause; cure\n"),
        (UserError("two\nlines  of it"), 2, "error: two lines of it\n"),
        (Sub("a kind of it"), 2, "error: a kind of it\n"),
        (
            Late("process 1 did not come; look at it"),
            1,
            "failed: process 1 did not come; look at it\n",
        ),
        (GuardStop("loss is nan"), 3, "loss is nan\n"),
        (Terminated("SIGTERM"), 143, "SIGTERM\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(error, code, line, command):
    assert command(fail(error)) == (code, "", line)


def test_anything_else_shows_its_traceback_and_ends_with_the_cause(command):
    code, out, err = command(fail(OSError(28, "No space left on device")))
    assert code == 1 and out == ""
    assert "Traceback" in err
    assert err.splitlines()[-1] == "failed: OSError: [Errno 28] No space left on device"


def test_debug_shows_the_traceback(command):
    code, _, err = command(fail(UserError("cause; cure")), ["--debug"])
    assert code == 2 and "Traceback" in err
    assert err.splitlines()[-1] == "error: cause; cure"


def test_logs_go_to_standard_output(command):
    def main(argv):
        logging.getLogger("bivl").info("progress")
        logging.getLogger("other").info("chatter")
        logging.getLogger("other").warning("warning")

    assert command(main) == (0, "progress\nwarning\n", "")


def test_arguments_reach_main(command, capsys):
    assert command(lambda argv: print(argv), ["--a", "b"]) == (0, "['--a', 'b']\n", "")


FLAGS = {"--workdir": {"required": True}, "--step": {"type": int}}


def parse(*argv):
    base = lambda args, keys: configs.from_dict({"steps": 3, "name": "x", "mesh": {"data": 1}})  # noqa: E731
    return cli.parse(list(argv), "text", FLAGS, base)


def test_parse():
    args, config = parse("--workdir=W", "--config.steps=5", "--step", "7", "--config.name", "a b")
    assert (args.workdir, args.step, args.debug) == ("W", 7, False)
    assert (config.steps, config.name) == (5, "a b")
    assert isinstance(config, ConfigDict)


def test_values_after_a_space_may_be_negative():
    assert parse("--workdir", "W", "--config.mesh.data", "-1")[1].mesh.data == -1


def test_values_may_hold_an_equals_sign():
    assert parse("--workdir=W", "--config.name=a=b")[1].name == "a=b"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "--workdir; see --help"),
        (("--workdir=W", "--wokdir=V"), "flag --wokdir is unknown; did you mean --workdir?"),
        (("--workdir=W", "--confg.steps=1"), "flag --confg.steps is unknown; did you mean"),
        (("--workdir=W", "--zzz"), "flag --zzz is unknown; known are --workdir, --step"),
        (("--workdir=W", "--work=V"), "flag --work is unknown"),  # no abbreviations
        (("--workdir=W", "W"), "flag W is unknown"),
        (("--workdir=W", "--step=x"), "argument --step: invalid int value: 'x'; see --help"),
        (("--workdir",), "argument --workdir: expected one argument"),
        (("--workdir=W", "--config.steps"), "flag --config.steps has no value"),
        (("--workdir=W", "--config.name", "--debug"), "flag --config.name has no value"),
        (("--workdir=W", "--config.name", "--config.steps=1"), "--config.name has no value"),
        (("--workdir=W", "--config.stpes=1"), "config has no key 'stpes'"),
        (("--workdir=W", "--config=no.py"), "config file no.py does not exist"),
    ],
)
def test_parse_refuses(argv, words):
    with pytest.raises(UserError, match=words.replace("?", r"\?")):
        parse(*argv)


def test_config_is_needed_where_there_is_no_base():
    with pytest.raises(UserError, match="--config is missing"):
        cli.parse(["--workdir=W"], "text", FLAGS)


def test_a_signal_is_a_flag_until_it_may_interrupt():
    before = signal.getsignal(signal.SIGTERM)
    term = cli.Termination()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        assert term.requested
        with pytest.raises(Terminated), term.interruptible():
            pytest.fail("a request from before must stop the block at its start")
        term.requested = False
        with pytest.raises(Terminated), term.interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the signal must end the block at once")
        term.requested = False
        os.kill(os.getpid(), signal.SIGTERM)  # outside the block: a flag again
        assert term.requested
    finally:
        term.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_where_jax_watches_no_handler_is_installed():
    before = signal.getsignal(signal.SIGTERM)
    term = cli.Termination(install=False)
    assert signal.getsignal(signal.SIGTERM) == before
    with term.interruptible():
        pass
    term.close()
