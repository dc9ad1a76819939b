"""A damaged or edited file is refused in one line that names it, or changes nothing."""

import pytest

from tests.fuzz import KINDS, Fuzz


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    return Fuzz(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("score")])
def test_a_damaged_file_is_refused_or_changes_nothing(kind, fuzz):
    figures = fuzz.damage(kind, 40 if kind.endswith(("resealed", "alone")) else 150)
    assert not figures.failures
    assert figures.counts["refused"] > (0 if kind.startswith("read") else 5)  # it is damage


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_damaged_files(kind, fuzz):
    assert not fuzz.damage(kind, 10_000).failures
