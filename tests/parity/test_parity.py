"""Every method of the registry gives what an implementation gives that is not ours."""

import re

import pytest

from jaxad.methods import METHODS
from tests.examples import slow_outside
from tests.parity import golden
from tests.parity.table import DOCUMENT, TOLERANCE, errors, note, start_of_row, tolerances

NAMES = golden.names()


@pytest.mark.parametrize("name", slow_outside(METHODS, NAMES))
def test_parity(name: str):
    allowed = {quantity: tolerance for quantity, (tolerance, _) in tolerances(name).items()}
    for quantity, error in errors(name).items():
        assert error <= allowed.get(quantity, TOLERANCE), (quantity, error)


def test_every_method_has_a_golden_file():
    assert {golden.method_of(name) for name in NAMES} == set(METHODS)


def test_every_golden_file_has_its_row():
    document = DOCUMENT.read_text()
    assert not [name for name in NAMES if start_of_row(name) not in document]
    notes = [note(*larger) for name in NAMES for larger in tolerances(name).values()]
    assert sorted(re.findall(r"^\[\^\d+\]: (.*)$", document, re.MULTILINE)) == sorted(notes)


def test_golden_files_are_small():
    sizes = [path.stat().st_size for path in golden.FOLDER.iterdir()]
    assert max(sizes) <= 200_000 and sum(sizes) <= 3_000_000
