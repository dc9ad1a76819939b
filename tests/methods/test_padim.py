"""PaDiM: its draw of channels, and a single image."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.base import Batch
from jaxad.methods.padim import padim

SHAPES = {"layer1": (4, 4, 3), "layer2": (2, 2, 4), "layer3": (1, 1, 2)}
OPTIONS = dict(backbone="pdn_small", layers=tuple(SHAPES), image_size=(8, 8), sigma=0.0)


def feature_maps(seed, n):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=(n, *shape)), jnp.float32) for k, shape in SHAPES.items()}


def embedding(x):
    """The channels of all stages, coarse stages repeated to the 4x4 grid."""
    parts = [np.asarray(m, np.float64).repeat(4 // m.shape[1], 1).repeat(4 // m.shape[2], 2) for m in x.values()]
    return np.concatenate(parts, -1).reshape(len(parts[0]), 16, 9)


def init(method, x, key=0):
    return method.stages[0].init(jax.random.key(key), None, None, x)


def fit(method, x):
    """A fit on one image."""

    @jax.jit
    def run(x):
        key, stage = jax.random.key(0), method.stages[0]
        batch = Batch(x, jnp.ones(1, bool), jnp.zeros(1, jnp.int32), None, jnp.zeros(1, jnp.int32))
        state, _ = stage.update(key, init(method, x), None, batch)
        return stage.finalize(key, state, None)

    return run(x)


def test_the_key_draws_the_channels():
    method, x = padim(n_features=4, **OPTIONS), feature_maps(0, 1)
    draws = {tuple(np.asarray(init(method, x, key).channels)) for key in range(8)}
    assert len(draws) > 3 and all(list(channels) == sorted(set(channels)) for channels in draws)


@pytest.mark.parametrize(("channels", "number"), [((64, 128, 256), 100), ((256, 512, 1024), 550)])
def test_number_of_channels_in_the_paper(channels, number):
    """100 of a ResNet-18's 448, 550 of a Wide ResNet-50's 1,792."""
    spec = {
        layer: jax.ShapeDtypeStruct((2, *grid, c), jnp.float32)
        for layer, grid, c in zip(SHAPES, ((4, 4), (2, 2), (1, 1)), channels, strict=True)
    }
    state = jax.eval_shape(lambda: init(padim(**OPTIONS), spec))
    assert state.channels.shape == (number,) and state.moments.scatter.shape == (16, number, number)


def test_one_image_is_enough():
    method, x = padim(n_features="all", **OPTIONS), feature_maps(0, 1)
    scores = jax.jit(method.score)(fit(method, x), None, feature_maps(1, 2))
    expected = np.linalg.norm(embedding(feature_maps(1, 2)) - embedding(x), axis=-1) / np.sqrt(0.01)
    assert np.isfinite(scores.image).all() and (np.asarray(scores.image) <= expected.max(1) * 1.001).all()


@pytest.mark.parametrize(
    ("hyperparameter", "message"),
    [
        ({"n_features": 0}, 'n_features must be 1 or more, or "all", got 0'),
        ({"n_features": 2.5}, 'n_features must be 1 or more, or "all", got 2.5'),
        ({"epsilon": 0.0}, "epsilon must be above 0, got 0.0"),
        ({"layers": ("layer9",)}, "layer9"),
    ],
)
def test_bad_hyperparameters(hyperparameter, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(padim)(**OPTIONS | hyperparameter)


def test_more_channels_than_there_are():
    with pytest.raises(ValueError, match=r"n_features must be at most 9 .* got 10"):
        init(padim(n_features=10, **OPTIONS), feature_maps(0, 1))
