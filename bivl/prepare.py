"""Builds what the package brings along: the emoji set, and small vocabularies, of any texts.

python -m bivl.prepare KIND --source=DIR --out=DIR      (KIND: a folder bivl/data/KIND)
"""

import argparse
import ast
import importlib
import pathlib
import sys

from bivl.core.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # one line like every other bad input, instead of a usage text
        raise UserError(f"{message}; see python -m bivl.prepare --help")


def kinds():
    """{KIND: what it does} of every package bivl/data/KIND with a prepare module."""
    data = pathlib.Path(__file__).parent / "data"
    docs = {
        path.parent.name: ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        for path in sorted(data.glob("*/prepare.py"))
    }
    return {kind: doc.partition("\n")[0] for kind, doc in docs.items()}


def run(arguments):
    """Prepares what the command line asks for; raises UserError on bad input."""
    parser = _Parser(
        prog="python -m bivl.prepare",
        description=__doc__.splitlines()[0],
        epilog="\n".join(["KIND:", *(f"  {kind:12}{what}" for kind, what in kinds().items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", metavar="KIND", help=f"one of: {', '.join(kinds())}")
    source = "folder with the raw data, or `packaged`: what the packaged vocabulary was made of"
    parser.add_argument("--source", required=True, help=source)
    parser.add_argument("--out", required=True, help="folder to write into")
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
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
