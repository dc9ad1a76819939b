"""SPADE against brute force on stacked features."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist

from jaxad.base import Batch
from jaxad.methods.spade import spade
from jaxad.ops.correspondence import pyramid_distances

SHAPES = {"layer1": (4, 4, 3), "layer2": (2, 2, 4), "layer3": (1, 1, 5)}
OPTIONS = dict(backbone="pdn_small", layers=("layer1", "layer2"), image_layer="layer3", image_size=(4, 4), sigma=0.0)
N = 7


def feature_maps(seed, n):
    """Multiples of 1/8, which half precision holds exactly."""
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.integers(-24, 24, (n, *shape)) / 8, jnp.float32) for k, shape in SHAPES.items()}


def stack(x):
    fine, coarse = np.asarray(x["layer1"]), np.asarray(x["layer2"])
    return np.concatenate([fine, coarse.repeat(2, 1).repeat(2, 2)], -1).reshape(len(fine), 16, 7)


def fit(method, x, order):
    """A fit on these images of `x`, in this order."""
    n = len(order)

    @jax.jit
    def run(key, x):
        part, index = jax.tree.map(lambda m: m[order], x), jnp.asarray(order, jnp.int32)
        batch = Batch(part, jnp.ones(n, bool), jnp.zeros(n, jnp.int32), None, index)
        stage = method.stages[0]
        state, _ = stage.update(key, stage.init(key, None, None, x), None, batch)
        return stage.finalize(key, state, None)

    return run(jax.random.key(0), x)


TRAIN, TEST = feature_maps(0, N), feature_maps(1, 3)


@pytest.mark.parametrize(("k", "kappa"), [(3, 4), (50, 2)])
def test_several_pixels_equal_brute_force(k, kappa):
    method = spade(num_neighbors=k, num_pixel_neighbors=kappa, **OPTIONS)
    scores = jax.jit(method.score)(fit(method, TRAIN, np.arange(N)[::-1].copy()), None, TEST)
    pooled = cdist(TEST["layer3"].mean((1, 2)), TRAIN["layer3"].mean((1, 2)), "sqeuclidean")
    nearest = np.argsort(pooled, 1)[:, :k]
    np.testing.assert_allclose(scores.image, np.sort(pooled, 1)[:, :k].mean(1), rtol=1e-4)
    for pixel, image, neighbors in zip(scores.pixel, stack(TEST), nearest, strict=True):
        gallery = stack(TRAIN)[neighbors].reshape(-1, 7)
        expected = np.sort(cdist(image, gallery, "sqeuclidean"), 1)[:, :kappa].mean(1)
        np.testing.assert_allclose(pixel.reshape(-1), expected, rtol=1e-4, atol=1e-4)


def test_fewer_images_than_neighbors():
    method = spade(num_neighbors=5, **OPTIONS)
    scores = jax.jit(method.score)(fit(method, TRAIN, np.array([2, 5])), None, TEST)
    pooled = cdist(TEST["layer3"].mean((1, 2)), TRAIN["layer3"].mean((1, 2))[np.array([2, 5])], "sqeuclidean")
    np.testing.assert_allclose(scores.image, pooled.mean(1), rtol=1e-4)
    gallery = stack(TRAIN)[[2, 5]].reshape(-1, 7)
    expected = [cdist(image, gallery, "sqeuclidean").min(1) for image in stack(TEST)]
    np.testing.assert_allclose(scores.pixel.reshape(3, -1), expected, rtol=1e-4, atol=1e-4)


def test_a_training_image_scores_zero():
    method = spade(num_neighbors=1, **OPTIONS)
    scores = jax.jit(method.score)(fit(method, TRAIN, np.arange(N)), None, jax.tree.map(lambda m: m[:2], TRAIN))
    np.testing.assert_allclose(scores.image, 0, atol=1e-4)
    np.testing.assert_allclose(scores.pixel, 0, atol=1e-3)


def test_the_image_layer_may_be_part_of_the_pyramid():
    method = spade(**OPTIONS | dict(image_layer="layer2", num_neighbors=2))
    scores = jax.jit(method.score)(fit(method, TRAIN, np.arange(N)), None, TEST)
    pooled = cdist(TEST["layer2"].mean((1, 2)), TRAIN["layer2"].mean((1, 2)), "sqeuclidean")
    np.testing.assert_allclose(scores.image, np.sort(pooled, 1)[:, :2].mean(1), rtol=1e-4)


def test_pyramid_distances_on_grids_that_do_not_divide():
    """A coarse pixel is repeated to the fine pixels whose centers it holds."""
    rng = np.random.default_rng(2)
    pairs = [tuple(rng.normal(size=(2, *shape)).astype(np.float32)) for shape in ((5, 3, 2), (3, 2, 4))]
    a, b = ([pair[i] for pair in pairs] for i in range(2))
    rows, columns = [0, 0, 1, 2, 2], [0, 1, 1]
    stacked = [np.concatenate([m[0], m[1][rows][:, columns]], -1).reshape(15, 6) for m in (a, b)]
    result = jax.jit(pyramid_distances)([(jnp.asarray(x), jnp.asarray(y)) for x, y in pairs])
    np.testing.assert_allclose(result, cdist(*stacked, "sqeuclidean"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("hyperparameter", "message"),
    [
        ({"num_neighbors": 0}, "num_neighbors must be 1 or more, got 0"),
        ({"num_pixel_neighbors": -1}, "num_pixel_neighbors must be 1 or more, got -1"),
        ({"image_layer": "layer9"}, "layer9"),
    ],
)
def test_bad_hyperparameters(hyperparameter, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(spade)(**OPTIONS | hyperparameter)
