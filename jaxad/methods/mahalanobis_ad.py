"""Mahalanobis AD: one Gaussian per stage over globally pooled features.

Stored: for every stage of the network the mean and the Cholesky factor of the Ledoit-Wolf covariance of its
average-pooled features (section III-B). An image scores the sum over the stages of its Mahalanobis distances (Eq. 2 and
section IV-B); there is no heat map. With `reduction="pca"` a stage keeps the leading principal components that explain
`variance_threshold` of the variance, with `"npca"` the other components (section III-C).

Family: features
Paper: Modeling the Distribution of Normal Data in Pre-Trained Deep Features for Anomaly Detection, ICPR 2020,
    arXiv:2005.14140.
Reference: https://github.com/ORippler/gaussian-ad-mvtec.
Differences: a score is the sum over the stages, not their mean. With fewer images than features, NPCA leaves out the
    last component, which has no variance, so that rounding errors decide its direction (on 100 images of MTD and three
    stages of a ResNet-50, scores change by up to 2 %, the image AUROC by 0.0004). Where the first component alone
    passes the threshold, NPCA keeps all, not only the last. The shrinkage is at least 1e-5, which matters for two
    images.
Results: experiments/recipes/mahalanobis_ad.py
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxad.backbones import Backbone, features
from jaxad.backbones import backbone as architecture
from jaxad.base import Batch, Frozen, Key, Method, PyTree, Scores, Stage
from jaxad.ops.collect import collect
from jaxad.ops.gaussian import HIGHEST, ledoit_wolf, mahalanobis
from jaxad.ops.loops import map_in_order


class PooledFeatures(NamedTuple):
    """The pooled features of all training images, by stage."""

    features: dict[str, Float[Array, "n _"]]
    seen: Bool[Array, "n"]


class StageGaussian(NamedTuple):
    """The Gaussian of one stage, in the coordinates `(x - center) @ basis`."""

    center: Float[Array, "c"]
    basis: Float[Array, "c c"] | None
    """Principal directions, zero where dropped; None without a reduction."""
    mean: Float[Array, "c"]
    factor: Float[Array, "c c"]


def mahalanobis_ad(
    *,
    backbone: str | Backbone = "tf_efficientnet_b4",
    layers: tuple[str, ...] | None = None,
    reduction: Literal["pca", "npca"] | None = None,
    variance_threshold: float = 0.99,
) -> Method:
    """Mahalanobis AD.

    Args:
        backbone: The network whose stages are modeled.
        layers: Its stages; None for all.
        reduction: "pca" or "npca" to reduce every stage; None to keep all dimensions, which is best in the paper.
        variance_threshold: Share of the variance at which the leading components end.

    Raises:
        ValueError: A hyperparameter is out of range.
    """
    if reduction not in (None, "pca", "npca"):
        raise ValueError(f'reduction must be "pca", "npca" or None, got "{reduction}"')
    if not 0 < variance_threshold < 1:
        raise ValueError(f"variance_threshold must be in (0, 1), got {variance_threshold}")
    layers = architecture(backbone).stages if layers is None else tuple(layers)

    def init(key: Key, state: None, frozen: Frozen, spec: PyTree) -> PooledFeatures:
        del key, state, frozen
        n = spec[layers[0]].shape[0]
        return PooledFeatures({layer: jnp.zeros(spec[layer].shape) for layer in layers}, jnp.zeros(n, bool))

    def update(key: Key, state: PooledFeatures, frozen: Frozen, batch: Batch) -> tuple[PooledFeatures, dict]:
        del key, frozen
        stored = {layer: collect(state.features[layer], batch.x[layer], batch) for layer in layers}
        return PooledFeatures(stored, collect(state.seen, batch.valid, batch)), {}

    def estimate(key: Key, state: PooledFeatures, frozen: Frozen) -> dict[str, StageGaussian]:
        del key, frozen
        stages = [state.features[layer] for layer in layers]
        return dict(zip(layers, map_in_order(lambda x: gaussian(x, state.seen), stages), strict=True))

    def gaussian(x: Float[Array, "n c"], seen: Bool[Array, "n"]) -> StageGaussian:
        if reduction is None:
            mean, covariance = ledoit_wolf(x, seen)
            return StageGaussian(jnp.zeros_like(mean), None, mean, jnp.linalg.cholesky(covariance))
        count = seen.sum().astype(x.dtype)
        center = jnp.where(seen[:, None], x, 0).sum(0) / count
        centered = jnp.where(seen[:, None], x - center, 0)
        variance, directions = jnp.linalg.eigh(jnp.matmul(centered.T, centered, precision=HIGHEST) / count)
        variance, directions = jnp.maximum(variance[::-1], 0), directions[:, ::-1]
        rank = jnp.arange(x.shape[1])
        last = jnp.argmax(jnp.cumsum(variance) > variance_threshold * variance.sum())
        kept = rank <= last if reduction == "pca" else (rank >= last - 1) & (rank < seen.sum() - 1)
        kept = kept | ~kept.any()  # a single image has no variance to tell components apart
        basis = jnp.where(kept, directions, 0)
        reduced = jnp.matmul(centered, basis, precision=HIGHEST)
        mean, covariance = ledoit_wolf(reduced, seen, kept)
        return StageGaussian(center, basis, mean, jnp.linalg.cholesky(covariance))

    def score(state: dict[str, StageGaussian], frozen: Frozen, x: dict[str, Array]) -> Scores:
        del frozen

        def distance(x: Float[Array, "b c"], stage: StageGaussian) -> Float[Array, "b"]:
            z = x - stage.center
            z = z if stage.basis is None else jnp.matmul(z, stage.basis, precision=HIGHEST)
            return mahalanobis(z, stage.mean, stage.factor)

        distances = map_in_order(distance, [x[layer] for layer in layers], [state[layer] for layer in layers])
        return Scores(sum(distances, jnp.zeros(())), None)

    return Method(features(backbone, layers, pool=True), (Stage("collect", init, update, estimate),), score)
