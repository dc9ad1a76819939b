"""Fixtures of the experiments' tests."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """Mixed types are promoted as outside of the tests; experiments and optax do so."""
    with jax.numpy_dtype_promotion("standard"):
        yield
