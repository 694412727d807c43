"""The generated parts of the documents: all between `<!-- paper.MODULE ARGUMENTS -->` and `<!-- end -->`.

    python -m paper.documents           # writes what the commands print, in README.md and paper/results/README.md
    python -m paper.documents FILE.csv  # prints a file of numbers as a table

A file of results that is not there yet gives a line that says so. A test compares documents and commands.
"""

import contextlib
import csv
import importlib
import io
import re
import shlex
from pathlib import Path

import common
import harness
from paper.table import markdown

DOCUMENTS = ("README.md", "paper/results/README.md")
BLOCK = re.compile(r"(?<=<!-- paper\.)(\w+) (.*?) -->\n(.*?)(?=<!-- end -->)", re.DOTALL)


def printed(module: str, arguments: str) -> str:
    """What `python -m paper.MODULE ARGUMENTS` prints."""
    argv = shlex.split(arguments)
    if missing := [each for each in argv if each.endswith(".csv") and not Path(each).exists()]:
        return f"*Not run yet: {', '.join(missing)}.*\n"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        importlib.import_module(f"paper.{module}").main(argv)
    return output.getvalue()


def main(argv: list[str] | None = None) -> None:
    parser = harness.Parser("paper.documents", __doc__)
    parser.add_argument("file", type=Path, nargs="?", help="a CSV file, to be printed as a table")
    args = parser.parse_args(argv)
    if args.file:
        with common.explained(f"cannot read {args.file}"), open(args.file, newline="", encoding="utf-8") as lines:
            header, *rows = csv.reader(lines)
        print(markdown(header, rows))
        return
    for path in filter(Path.exists, map(Path, DOCUMENTS)):
        old = path.read_text(encoding="utf-8")
        new = BLOCK.sub(lambda block: f"{block[1]} {block[2]} -->\n{printed(block[1], block[2])}", old)
        with common.replacing(path) as temporary:
            temporary.write_text(new, encoding="utf-8")
        print(f"{path}: {len(BLOCK.findall(new))} generated parts, {'changed' if new != old else 'as they were'}")


if __name__ == "__main__":
    harness.cli(main)
