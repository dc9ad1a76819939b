"""Mahalanobis AD of few and of equal images."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA

from jaxad.base import Batch
from jaxad.methods.mahalanobis_ad import mahalanobis_ad
from tests.examples import slow_after

WIDTHS = {"layer1": 6, "layer2": 10}
OPTIONS = dict(backbone="pdn_small", layers=tuple(WIDTHS))


def features(seed, n):
    """Correlated, with variances from 1 down to 0.01, on one basis for all seeds."""
    basis, rng = np.random.default_rng(99), np.random.default_rng(seed)
    result = {}
    for layer, width in WIDTHS.items():
        rotation = np.linalg.qr(basis.normal(size=(width, width)))[0]
        result[layer] = (rng.normal(size=(n, width)) * np.geomspace(1, 0.1, width) @ rotation + 2).astype(np.float32)
    return result


def fit(method, x):
    n = x["layer1"].shape[0]
    ones, zeros = jnp.ones(n, bool), jnp.zeros(n, jnp.int32)

    @jax.jit
    def run(key, x):
        batch = Batch(x, ones, zeros, None, jnp.arange(n, dtype=jnp.int32))
        stage = method.stages[0]
        state, _ = stage.update(key, stage.init(key, None, None, x), None, batch)
        return stage.finalize(key, state, None)

    return run(jax.random.key(0), x)


def test_npca_of_few_images_leaves_out_the_component_without_variance():
    method = mahalanobis_ad(reduction="npca", variance_threshold=0.9, **OPTIONS)
    train, test = features(0, 5), features(1, 4)
    scores = jax.jit(method.score)(fit(method, train), None, test)
    expected = np.zeros(4)
    for layer in WIDTHS:
        pca = PCA().fit(train[layer].astype(np.float64))
        last = int(np.argmax(np.cumsum(pca.explained_variance_ratio_) > 0.9))
        components = pca.components_[max(last - 1, 0) : 4]
        x, y = ((maps[layer] - pca.mean_) @ components.T for maps in (train, test))
        gaussian = LedoitWolf().fit(x)
        expected += [mahalanobis(v, gaussian.location_, gaussian.precision_) for v in y]
    np.testing.assert_allclose(scores.image, expected, rtol=1e-3)
    assert scores.pixel is None


def test_all_stages_by_default():
    method = mahalanobis_ad(backbone="pdn_small")
    spec = {layer: jax.ShapeDtypeStruct((3, 5), jnp.float32) for layer in ("layer1", "layer2", "layer3")}
    assert set(method.stages[0].init(jax.random.key(0), None, None, spec).features) == set(spec)


def test_equal_images_give_finite_scores():
    method = mahalanobis_ad(**OPTIONS)
    same = {layer: np.full((4, width), 3, np.float32) for layer, width in WIDTHS.items()}
    state = fit(method, same)
    away = jax.tree.map(lambda leaf: jnp.asarray(leaf[:1] + 2), same)
    np.testing.assert_allclose(
        jax.jit(method.score)(state, None, away).image, [2 * (np.sqrt(6) + np.sqrt(10))], rtol=1e-5
    )


@pytest.mark.parametrize("reduction", ["pca", "npca"])
def test_equal_images_give_finite_scores_with_a_reduction(reduction):
    method = mahalanobis_ad(reduction=reduction, **OPTIONS)
    same = {layer: np.full((4, width), 3, np.float32) for layer, width in WIDTHS.items()}
    assert np.isfinite(jax.jit(method.score)(fit(method, same), None, same).image).all()


@pytest.mark.parametrize(
    ("hyperparameter", "message"),
    [
        ({"reduction": "ica"}, 'reduction must be "pca", "npca" or None, got "ica"'),
        ({"variance_threshold": 1.0}, r"variance_threshold must be in \(0, 1\), got 1.0"),
        ({"layers": ("layer9",)}, "layer9"),
        ({"backbone": "nothing"}, "nothing"),
    ],
)
def test_bad_hyperparameters(hyperparameter, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(mahalanobis_ad)(**OPTIONS | hyperparameter)


@pytest.mark.parametrize("reduction", [None, "pca", "npca"])
@pytest.mark.parametrize("n", slow_after(1, [1, 2, 3]))
def test_few_images_give_finite_scores(n, reduction):
    """Two images have an optimal shrinkage of 0, one has no variance at all."""
    rng = np.random.default_rng(3)
    method = mahalanobis_ad(reduction=reduction, **OPTIONS)
    few = {layer: rng.normal(3, 1, (n, width)).astype(np.float32) for layer, width in WIDTHS.items()}
    state = fit(method, few)
    away = jax.tree.map(lambda leaf: jnp.concatenate([jnp.asarray(leaf[:1]), jnp.asarray(leaf[:1] + 9)]), few)
    score = np.asarray(jax.jit(method.score)(state, None, away).image)
    assert np.isfinite(score).all() and (reduction or score[1] > score[0])
