"""Mahalanobis AD: one Gaussian per stage over globally pooled features.

Stored: for every stage of the network the mean and the Cholesky factor of the Ledoit-Wolf covariance of its
average-pooled features (section III-B). An image scores the sum over the stages of its Mahalanobis distances (Eq. 2 and
section IV-B); there is no heat map. With `reduction="pca"` a stage keeps the leading principal components that explain
`variance_threshold` of the variance, with `"npca"` the remaining ones (section III-C).

Paper: Modeling the Distribution of Normal Data in Pre-Trained Deep Features for Anomaly Detection, ICPR 2020,
    arXiv:2005.14140.
Reference: https://github.com/ORippler/gaussian-ad-mvtec.
Differences: with fewer images than features, NPCA leaves out the last component: it has no variance, and so its
    direction is that of rounding errors.
Results: experiments/recipes/mahalanobis_ad.py
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxad.backbones import backbone as architecture
from jaxad.backbones import features
from jaxad.base import Batch, Frozen, Key, Method, PyTree, Scores, Stage
from jaxad.ops.gaussian import HIGHEST, ledoit_wolf, mahalanobis
from jaxad.ops.lapack import after


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
    backbone: str = "tf_efficientnet_b4",
    layers: tuple[str, ...] | None = None,
    reduction: Literal["pca", "npca"] | None = None,
    variance_threshold: float = 0.99,
) -> Method:
    """Mahalanobis AD.

    Args:
        backbone: The network whose stages are modeled.
        layers: Its stages; None for all.
        reduction: "pca" or "npca" to reduce every stage; None to keep all dimensions, the paper's best.
        variance_threshold: Share of the variance that separates the two parts.

    Raises:
        ValueError: A hyper-parameter is out of its range.
    """
    if reduction not in (None, "pca", "npca"):
        raise ValueError(f'reduction must be "pca", "npca" or None, got "{reduction}"')
    if not 0 < variance_threshold < 1:
        raise ValueError(f"variance_threshold must be in (0, 1), got {variance_threshold}")
    layers = architecture(backbone).stages if layers is None else tuple(layers)

    def init(key: Key, frozen: Frozen, spec: PyTree) -> PooledFeatures:
        del key, frozen
        n = spec[layers[0]].shape[0]
        return PooledFeatures({layer: jnp.zeros(spec[layer].shape) for layer in layers}, jnp.zeros(n, bool))

    def collect(key: Key, state: PooledFeatures, frozen: Frozen, batch: Batch) -> tuple[PooledFeatures, dict]:
        del key, frozen
        row = jnp.where(batch.valid, batch.index, state.seen.shape[0])
        stored = {layer: state.features[layer].at[row].set(batch.x[layer], mode="drop") for layer in layers}
        return PooledFeatures(stored, state.seen.at[row].set(True, mode="drop")), {}

    def estimate(key: Key, state: PooledFeatures, frozen: Frozen) -> dict[str, StageGaussian]:
        del key, frozen
        made: dict[str, StageGaussian] = {}
        for layer in layers:
            x = state.features[layer]
            for before in list(made.values())[-1:]:
                x = after(x, before.factor)
            made[layer] = gaussian(x, state.seen)
        return made

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
        total = jnp.zeros(x[layers[0]].shape[0])
        for layer in layers:
            center, basis, mean, factor = state[layer]
            z = after(x[layer] - center, total)
            z = z if basis is None else jnp.matmul(z, basis, precision=HIGHEST)
            total = total + mahalanobis(z, mean, factor)
        return Scores(total, None)

    return Method(features(backbone, layers, pool=True), init, (Stage("collect", collect, estimate),), score)
