"""Turns raw data into what training reads: a TFDS ArrayRecord directory, a vocabulary.

python -m bivl.prepare KIND --source=DIR --out=DIR      (KIND: a folder bivl/data/KIND)
"""

import argparse
import importlib
import pathlib
import sys

from bivl.core.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # one line like every other bad input, instead of a usage text
        raise UserError(f"{message}; see python -m bivl.prepare --help")


def kinds():
    """The KINDs there are: every package bivl/data/KIND with a prepare module."""
    data = pathlib.Path(__file__).parent / "data"
    return sorted(path.parent.name for path in data.glob("*/prepare.py"))


def run(arguments):
    """Prepares what the command line asks for; raises UserError on bad input."""
    parser = _Parser(prog="python -m bivl.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("kind", metavar="KIND", help=f"one of: {', '.join(kinds())}")
    parser.add_argument("--source", required=True, help="folder with the raw data")
    parser.add_argument("--out", required=True, help="folder to write KIND/VERSION into")
    options = parser.parse_args(arguments)
    if options.kind not in kinds():
        raise UserError(f"unknown KIND {options.kind!r}; choose one of: {', '.join(kinds())}")
    module = importlib.import_module(f"bivl.data.{options.kind}.prepare")
    print(module.prepare(options.source, options.out))


def main():
    """The command line: exit code 2 and one line on standard error for bad input."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        run([argument for argument in arguments if argument != "--debug"])
    except UserError as error:
        if debug:
            raise
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
