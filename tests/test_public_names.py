"""What `import jaxad` offers, and that it loads nothing before it is used."""

import subprocess
import sys

import pytest

import jaxad


def test_importing_jaxad_imports_nothing_else():
    code = "import sys, jaxad; assert not {'jax', 'flax', 'numpy'} & set(sys.modules), 'imports too much'"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", jaxad.__all__)
def test_a_public_name_exists(name):
    assert getattr(jaxad, name) is not None and name in dir(jaxad)


def test_a_public_name_is_what_it_says():
    assert jaxad.fit.__module__ == jaxad.fit_classes.__module__ == "jaxad.driver.fit"
    assert jaxad.score.__module__ == "jaxad.driver.scoring"
    assert jaxad.methods.__name__ == "jaxad.methods"


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match=r"^module 'jaxad' has no attribute 'fot'$"):
        getattr(jaxad, "fot")  # noqa: B009
