"""Programs are compiled with XLA's options for the backend, where XLA knows them."""

import jax
import numpy as np
import pytest

from jaxad import program


@pytest.fixture
def fresh():
    program.compiler_options.cache_clear()
    yield
    program.compiler_options.cache_clear()


def convolution(x, w):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("options", [program.EIGEN, {"xla_no_such_option": "1"}])
def test_a_program_compiles_whether_or_not_xla_knows_the_options(monkeypatch, fresh, options):
    monkeypatch.setattr(program, "EIGEN", options)
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 5, 6, 3)).astype(np.float32), rng.normal(size=(3, 3, 3, 4)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = sum(padded[:, i : i + 5, j : j + 6] @ w[i, j] for i in range(3) for j in range(3))
    np.testing.assert_allclose(program.Program(convolution)(x, w), expected, atol=1e-5)


def test_only_options_that_xla_knows_are_used(monkeypatch, fresh):
    monkeypatch.setattr(program, "EIGEN", {"xla_no_such_option": "1"})
    assert program.compiler_options() == {}
