"""The registry finds methods by the names of their files, and imports them on first use."""

import importlib
import subprocess
import sys

import pytest

from jaxad import methods
from jaxad.methods import METHODS, describe, factory, names
from tests.examples import slow_after


def run(code: str) -> None:
    """Runs code in a fresh interpreter, where nothing is imported yet."""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_listing_imports_neither_jax_nor_flax():
    run(
        "import sys, jaxad, jaxad.methods as methods\n"
        "assert 'padim' in methods.METHODS and 'padim' in dir(methods) and 'methods' in dir(jaxad)\n"
        "assert len([methods.describe(name) for name in methods.METHODS]) == len(methods.METHODS) > 20\n"
        "assert not {'jax', 'flax', 'numpy', 'jaxad.methods.padim'} & set(sys.modules)"
    )


@pytest.mark.parametrize(
    "first",
    slow_after(
        2,
        [
            "from jaxad.methods.padim import PadimGaussian",
            "import jaxad; jaxad.methods.METHODS['padim']",
            "import jaxad.methods.padim",
            "from jaxad.methods import padim",
            "import importlib; importlib.import_module('jaxad.methods.padim')",
        ],
    ),
)
def test_an_attribute_is_the_factory_whatever_was_imported_first(first):
    run(
        f"{first}\n"
        "import sys, jaxad\n"
        "from jaxad.methods import padim\n"
        "assert padim is jaxad.methods.padim is jaxad.methods.factory('padim')\n"
        "assert padim is sys.modules['jaxad.methods.padim'].padim\n"
        "assert 'jaxad.methods.spade' not in sys.modules"
    )


def test_names_are_sorted_files():
    assert list(METHODS) == list(names()) == sorted(names())
    assert {"padim", "patchcore", "spade"} <= set(names()) and not any(name.startswith("_") for name in names())


def test_the_mapping_gives_factories():
    assert METHODS["padim"] is factory("padim") is importlib.import_module("jaxad.methods.padim").padim
    assert "padm" not in METHODS and METHODS.get("padm") is None
    with pytest.raises(KeyError):
        METHODS["padm"]


@pytest.mark.parametrize("lookup", [factory, describe])
def test_unknown_names_are_refused_in_one_line(lookup):
    with pytest.raises(ValueError, match=r"^no method is called 'patchcor': did you mean patchcore\?$"):
        lookup("patchcor")
    with pytest.raises(ValueError, match=r"^no method is called '\?': known are cfa, .*, uninformed_students$"):
        lookup("?")
    with pytest.raises(AttributeError, match=r"^module 'jaxad.methods' has no attribute 'padm'$"):
        getattr(methods, "padm")  # noqa: B009


def test_a_description_is_read_from_the_docstring():
    name, title, summary, family, paper = describe("padim")
    assert (name, title, family) == ("padim", "PaDiM", "features")
    assert summary == "one Gaussian per image position over features of several stages"
    assert paper.startswith("PaDiM: a Patch Distribution") and paper.endswith("ICPR Workshops 2021, arXiv:2011.08785")


@pytest.mark.parametrize("name", names())
def test_every_description_is_complete(name):
    assert all(describe(name))
