"""Range checks of hyperparameters: messages name the hyperparameter and its value."""

import math

import pytest

from jaxad.training.checks import above_zero, at_least_one, multiples_of, zero_or_more


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_above_zero(value: float):
    above_zero(rate=1e-9)
    with pytest.raises(ValueError, match=f"rate must be above 0, got {value}"):
        above_zero(rate=value)


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_zero_or_more(value: float):
    zero_or_more(decay=0.0)
    with pytest.raises(ValueError, match=f"decay must be 0 or more, got {value}"):
        zero_or_more(decay=value)


def test_at_least_one():
    at_least_one(epochs=1)
    with pytest.raises(ValueError, match="epochs must be 1 or more, got 0"):
        at_least_one(epochs=0)


@pytest.mark.parametrize("size", [(32, 33), (0, 32), (-32, 32)])
def test_multiples_of(size: tuple[int, int]):
    multiples_of(32, image_size=(32, 64))
    with pytest.raises(ValueError, match=r"image_size must be multiples of 32, got \("):
        multiples_of(32, image_size=size)
