"""Writes the tables of results in the documents anew, from experiments/results/*.json; nobody types a number there.

    python experiments/update_readme.py

A table stands between <!-- results --> and <!-- /results -->, or, for one data set, between <!-- results mtd --> and
the same. `--check` changes nothing and fails where a table is not the one that the results give.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import tyro

from jaxad.artifact import write_atomically
from jaxad.report.tables import results_markdown

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"^(<!-- results ?(\w*) -->\n).*?(?=^<!-- /results -->$)", re.DOTALL | re.MULTILINE)
NONE = "Nothing is measured yet: see `experiments/run.py`.\n"


@dataclass
class Options:
    """Update the tables of results."""

    documents: tuple[Path, ...] = (ROOT / "README.md", ROOT / "docs" / "results.md")
    results: Path = ROOT / "experiments" / "results"
    check: bool = False
    """Change nothing; fail where a table is out of date."""


def updated(document: str, results: Path) -> str:
    """The text of a document with a table of `results` between its markers.

    Raises:
        ValueError: The markers are not there once each, or a file in `results` is no result.
    """

    def filled(match: re.Match[str]) -> str:
        table = results_markdown(results, match[2] or None)
        return match[1] + (table if table.count("\n") > 2 else NONE)  # two lines are the head alone

    text, found = MARKED.subn(filled, document)
    if found != 1:
        raise ValueError(
            f"a document needs one pair of <!-- results --> and <!-- /results -->, on lines of their own; got {found}"
        )
    return text


def main(options: Options) -> None:
    """Writes the documents, or checks them."""
    for path in options.documents:
        old = path.read_text(encoding="utf-8")
        try:
            new = updated(old, options.results)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        if options.check and new != old:
            raise SystemExit(f"{path} is out of date: run python experiments/update_readme.py")
        if new != old:
            write_atomically(path, new)


if __name__ == "__main__":
    main(tyro.cli(Options))
