"""Writes the table of results in README.md anew, from experiments/results/*.json; nobody types a number there.

    python experiments/update_readme.py

`--check` changes nothing and fails where the table is not the one that the results give.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import tyro

from jaxad.artifact import write_atomically
from jaxad.report.tables import results_markdown

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(?<=^<!-- results -->\n).*?(?=^<!-- /results -->$)", re.DOTALL | re.MULTILINE)
NONE = "Nothing is measured yet: see `experiments/run.py`.\n"


@dataclass
class Options:
    """Update the table of results in the README."""

    readme: Path = ROOT / "README.md"
    results: Path = ROOT / "experiments" / "results"
    check: bool = False
    """Change nothing; fail where the table is out of date."""


def updated(readme: str, results: Path) -> str:
    """The text of a README with the table of `results` between its markers.

    Raises:
        ValueError: The markers are not there once each, or a file in `results` is no result.
    """
    table = results_markdown(results)
    body = table if table.count("\n") > 2 else NONE  # two lines are the head alone
    text, found = MARKED.subn(lambda _: body, readme)
    if found != 1:
        raise ValueError(
            f"the README needs one pair of <!-- results --> and <!-- /results -->, on lines of their own; got {found}"
        )
    return text


def main(options: Options) -> None:
    """Writes the README, or checks it."""
    old = options.readme.read_text(encoding="utf-8")
    try:
        new = updated(old, options.results)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if options.check and new != old:
        raise SystemExit(f"{options.readme} is out of date: run python experiments/update_readme.py")
    if new != old:
        write_atomically(options.readme, new)


if __name__ == "__main__":
    main(tyro.cli(Options))
