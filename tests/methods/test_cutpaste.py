"""CutPaste: its grid of patches, short trainings, and the checks of its hyperparameters."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.data import Preprocess, open_data
from jaxad.driver.fit import fit
from jaxad.methods.cutpaste import cutpaste, spread_matrix
from tests.tiny import TINY_RESNET

KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
OPTIONS = dict(backbone=TINY_RESNET, layer="layer2", image_size=(32, 32), head=(8, 4), epochs=1, train_batch_size=3)


@pytest.fixture(scope="module")
def frozen():
    return TINY_RESNET.init(jax.random.key(1))


def fit_cutpaste(frozen, **options):
    method = cutpaste(**OPTIONS | options)
    data = open_data(IMAGES, preprocess=Preprocess(None))["arrays"].train
    return method, fit(method, frozen, data, KEY)


def maps_of(frozen, state, images):
    apply = jax.jit(TINY_RESNET.apply, static_argnums=2)
    return np.asarray(apply(frozen | {"params": state.params}, images, ("layer2",))["layer2"], np.float64)


def test_patches_lie_on_a_grid_and_are_spread_by_gaussians(frozen):
    method, fitted = fit_cutpaste(frozen, patch_size=16, stride=8, way="scar", learning_rate=0.01)
    assert fitted.state.mean.shape == (32,)
    scores = jax.jit(method.score)(fitted.state, frozen, jnp.asarray(IMAGES))
    covariance = np.asarray(fitted.state.factor, np.float64) @ np.asarray(fitted.state.factor, np.float64).T
    grid = np.zeros((6, 3, 3))
    for i, j in np.ndindex(3, 3):
        patch = IMAGES[:, 8 * i : 8 * i + 16, 8 * j : 8 * j + 16]
        pooled = maps_of(frozen, fitted.state, patch).mean((1, 2))
        centered = pooled / np.linalg.norm(pooled, axis=1, keepdims=True) - np.asarray(fitted.state.mean)
        grid[:, i, j] = np.sqrt(np.einsum("bi,ij,bj->b", centered, np.linalg.inv(covariance), centered))
    np.testing.assert_allclose(scores.image, grid.max((1, 2)), rtol=1e-2)
    matrix = spread_matrix(3, 32, 7.5, 8, 8)
    np.testing.assert_allclose(matrix.sum(1), 1)
    assert [int(i) for i in matrix[[2, 15, 29]].argmax(1)] == [0, 1, 2]
    np.testing.assert_allclose(scores.pixel, np.einsum("Hh,bhw,Ww->bHW", matrix, grid, matrix), rtol=2e-2)


@pytest.mark.slow
def test_training_lowers_the_loss(frozen):
    _, fitted = fit_cutpaste(frozen, epochs=120, learning_rate=0.05)
    loss = np.asarray(fitted.metrics["loss"])
    assert loss[-40:].mean() < 0.9 * loss[:10].mean()


@pytest.mark.slow
@pytest.mark.parametrize(("frozen_share", "changes"), [(0.5, True), (1.0, False), (0.0, True)])
def test_a_pretrained_network_is_frozen_at_first(frozen, frozen_share, changes):
    options = dict(pretrained=True, epochs=2, learning_rate=0.1, weight_decay=0.0)
    _, fitted = fit_cutpaste(frozen, frozen_share=frozen_share, **options)
    pairs = zip(jax.tree.leaves(fitted.state.params), jax.tree.leaves(frozen["params"]), strict=True)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs) == changes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(way="4way"), "way must be one of binary, scar, 3way, got 4way"),
        (dict(frozen_share=1.5), r"frozen_share must be in \[0, 1\], got 1.5"),
        (dict(head=()), r"head must be numbers of units, one or more, got \(\)"),
        (dict(patch_size=40), r"patch_size must be in \[1, 32\], got 40"),
        (dict(backbone="pdn_small"), "the backbone must be a ResNet, got pdn_small"),
    ],
)
def test_bad_hyperparameters_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(cutpaste)(**OPTIONS | options)
