"""PatchCore: nearest neighbors of patch features in a coreset of the normal ones.

Stored: a memory bank of locally aware patch features (the 3x3 neighborhood mean of layer2 and layer3, stacked, Eq. 1-2
and 4 of section 3.1), thinned by greedy k-center selection on a random projection (section 3.2,
algorithm 1). A patch scores its distance to its nearest neighbors in the bank, an image the score of its worst patch
(Eq. 6), optionally re-weighted by how far the nearest bank entry lies from its own neighbors (Eq. 7). The heat map is
the upsampled patch scores, smoothed.
Fitting holds all patches: 4 * n * h * w * c bytes for n images, and beside them three times 128 / c of that for the
projection as it is, centered and in blocks, and the ratio of that for the bank. Scoring holds the bank.

Paper: Towards Total Recall in Industrial Anomaly Detection, CVPR 2022, arXiv:2106.08265.
Reference: https://github.com/amazon-science/patchcore-inspection (no re-weighting).
Differences: the stacked channels are kept as they are (1,536 for a ResNet-50) instead of being averaged in groups down
    to 1,024; the coreset is the exact greedy one, not one from 10 sampled starting points; an ensemble's members are
    put on one scale by the spread of their banks, not by the minimum and maximum over the test set.
Results: experiments/recipes/patchcore.py
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxad.backbones import backbone as architecture
from jaxad.backbones import features
from jaxad.base import Batch, Frozen, Key, Method, PyTree, Scores, Stage, State
from jaxad.ops.coreset import greedy_coreset
from jaxad.ops.heatmap import neighborhood_mean, stack_maps, upsample_blur
from jaxad.ops.knn import Sketch, knn, sketch
from jaxad.ops.sharding import take_rows

ROUNDED_FROM, ROUNDED_TO = 2048, 128
"""Rows from which a bank has room for a multiple of so many, which common numbers of devices divide."""


class PatchcorePatches(NamedTuple):
    """All patches of the training images, while they are collected."""

    patches: Float[Array, "n p c"]
    seen: Bool[Array, "n"]


class PatchcoreBank(NamedTuple):
    """The memory bank: its first `size` rows count."""

    bank: Float[Array, "m c"]
    size: Int[Array, ""]
    radius: Float[Array, ""]
    """Largest distance of a training patch to the bank, in the projected space in which it was chosen; after `update` a
    bound of it."""
    sketch: Sketch | None
    """What makes looking up faster; None for a small bank."""


def patchcore(
    *,
    backbone: str | tuple[str, ...] = "wide_resnet50_2",
    layers: tuple[str, ...] | None = None,
    image_size: tuple[int, int] = (224, 224),
    patch_size: int = 3,
    coreset_sampling_ratio: float = 0.1,
    projection_dim: int | None = 128,
    num_neighbors: int = 1,
    scoring: Literal["official", "paper"] = "official",
    reweight_neighbors: int = 9,
    sigma: float = 4.0,
) -> Method:
    """PatchCore.

    Args:
        backbone: The network that describes patches; several make an ensemble, whose `frozen` is a tuple.
        layers: Its stages, the finest first; None for those that describe patches (layer2 and layer3 of a ResNet).
        image_size: (height, width) of the images, which is that of the heat map.
        patch_size: Side of the neighborhood that a patch feature averages.
        coreset_sampling_ratio: Share of the patches kept, in (0, 1]; 1 keeps all.
        projection_dim: Dimensions of the Gaussian random projection for the selection; None for no projection.
        num_neighbors: Neighbors whose mean distance a patch scores.
        scoring: "official" takes the maximum over patches, "paper" re-weights it (Eq. 7).
        reweight_neighbors: Neighbors of the nearest bank entry, itself included, that Eq. 7 looks at (b).
        sigma: Smoothing of the heat map in pixels.

    Raises:
        ValueError: A hyper-parameter is out of its range.
    """
    if not 0 < coreset_sampling_ratio <= 1:
        raise ValueError(f"coreset_sampling_ratio must be in (0, 1], got {coreset_sampling_ratio}")
    for name, value in (("patch_size", patch_size), ("num_neighbors", num_neighbors)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    if reweight_neighbors < 2:
        raise ValueError(f"reweight_neighbors must be 2 or more (the entry is the first), got {reweight_neighbors}")
    if projection_dim is not None and projection_dim < 1:
        raise ValueError(f"projection_dim must be 1 or more, or None for no projection, got {projection_dim}")
    if scoring not in ("official", "paper"):
        raise ValueError(f'scoring must be "official" or "paper", got "{scoring}"')
    options = dict(
        layers=layers,
        image_size=image_size,
        patch_size=patch_size,
        ratio=coreset_sampling_ratio,
        projection_dim=projection_dim,
        num_neighbors=num_neighbors,
        reweight=reweight_neighbors if scoring == "paper" else 0,
        sigma=sigma,
    )
    if isinstance(backbone, str):
        return _single(backbone, **options)
    if not backbone:
        raise ValueError("an ensemble needs at least one backbone, got an empty tuple")
    return _ensemble(tuple(_single(name, **options) for name in backbone))


def _single(
    backbone: str, layers, image_size, patch_size, ratio, projection_dim, num_neighbors, reweight, sigma
) -> Method:
    layers = architecture(backbone).patch_layers if layers is None else tuple(layers)

    def describe(x: dict[str, Array]) -> Float[Array, "b h w c"]:
        return stack_maps([neighborhood_mean(x[layer], patch_size) for layer in layers])

    def init(key: Key, frozen: Frozen, spec: PyTree) -> PatchcorePatches:
        del key, frozen
        n, h, w, c = jax.eval_shape(describe, spec).shape
        return PatchcorePatches(jnp.zeros((n, h * w, c)), jnp.zeros(n, bool))

    def collect(key: Key, state: PatchcorePatches, frozen: Frozen, batch: Batch) -> tuple[PatchcorePatches, dict]:
        del key, frozen
        patches = describe(batch.x)
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        row = jnp.where(batch.valid, batch.index, state.seen.shape[0])
        seen = state.seen.at[row].set(True, mode="drop")
        return PatchcorePatches(state.patches.at[row].set(patches, mode="drop"), seen), {}

    def thin(key: Key, state: PatchcorePatches, frozen: Frozen) -> PatchcoreBank:
        del frozen
        n, p, _ = state.patches.shape
        size = jnp.round(ratio * (state.seen.sum() * p).astype(jnp.float32)).astype(jnp.int32)
        points, valid = state.patches.reshape(n * p, -1), jnp.repeat(state.seen, p)
        return _thin(key, points, valid, max(1, round(ratio * n * p)), jnp.maximum(size, 1), projection_dim)

    def score(state: PatchcoreBank, frozen: Frozen, x: dict[str, Array]) -> Scores:
        del frozen
        query = describe(x)
        b, h, w, c = query.shape
        valid = jnp.arange(state.bank.shape[0]) < state.size
        neighbors = min(num_neighbors, state.bank.shape[0])
        distance, index = knn(query.reshape(-1, c), state.bank, neighbors, valid, state.sketch)
        found = jnp.isfinite(distance)
        patch = jnp.where(found, distance, 0).sum(1) / found.sum(1).astype(jnp.float32)
        patch, nearest = patch.reshape(b, h * w), index[:, 0].reshape(b, h * w)
        worst = jnp.argmax(patch, 1)
        image = jnp.take_along_axis(patch, worst[:, None], 1)[:, 0]
        if reweight:
            feature = jnp.take_along_axis(query.reshape(b, h * w, c), worst[:, None, None], 1)[:, 0]
            center = state.bank[jnp.take_along_axis(nearest, worst[:, None], 1)[:, 0]]
            image = image * _reweight(feature, center, state.bank, valid, min(reweight, state.bank.shape[0]))
        return Scores(image, upsample_blur(patch.reshape(b, h, w), image_size, sigma))

    return Method(features(backbone, layers), init, (Stage("collect", collect, thin),), score)


def _thin(
    key: Key,
    points: Float[Array, "n c"],
    valid: Bool[Array, "n"],
    k: int,
    size: Int[Array, ""],
    projection_dim: int | None,
) -> PatchcoreBank:
    """The greedy coreset of `size` of the valid points (or all, where they are fewer), with room for `k`."""
    first_key, projection_key = jax.random.split(key)
    n, c = points.shape
    count = jnp.sum(valid, dtype=jnp.int32)
    if k == n:
        order = jnp.argsort(~valid, stable=True)
        return _bank(take_rows(points, order), count, jnp.zeros(()))
    space = points
    if projection_dim is not None and projection_dim < c:
        projection = jax.random.normal(projection_key, (c, projection_dim)) / jnp.sqrt(jnp.float32(projection_dim))
        space = jnp.matmul(points, projection, precision=jax.lax.Precision.HIGHEST)
    rank = jax.random.randint(first_key, (), 0, jnp.maximum(count, 1))
    first = jnp.searchsorted(jnp.cumsum(valid), rank + 1)
    capacity = k if k < ROUNDED_FROM else min(-(-k // ROUNDED_TO) * ROUNDED_TO, n)
    coreset = greedy_coreset(space, capacity, first, valid, jnp.minimum(size, k))
    return _bank(take_rows(points, coreset.index), coreset.size, coreset.radius)


def _bank(rows: Float[Array, "m c"], size: Int[Array, ""], radius: Float[Array, ""]) -> PatchcoreBank:
    return PatchcoreBank(rows, size, radius, sketch(rows, jnp.arange(rows.shape[0]) < size))


def _reweight(
    feature: Float[Array, "b c"],
    center: Float[Array, "b c"],
    bank: Float[Array, "m c"],
    valid: Bool[Array, "m"],
    b: int,
) -> Float[Array, "b"]:
    """1 minus the softmax weight of the nearest bank entry among its b nearest in the bank (Eq. 7)."""
    _, index = knn(center, bank, b, valid)
    distance = jnp.linalg.norm(feature[:, None] - bank[index], axis=-1)
    distance = jnp.where(valid[index], distance, -jnp.inf)
    own = jnp.linalg.norm(feature - center, axis=-1)
    return 1 - jnp.exp(own - jax.nn.logsumexp(distance, axis=1))


def _ensemble(members: tuple[Method, ...]) -> Method:
    """Members fitted side by side; their scores, in units of the spread of the bank, are averaged."""

    def embed(frozen: tuple, image: Array) -> tuple:
        return tuple(m.embed(f, image) for m, f in zip(members, frozen, strict=True))

    def init(key: Key, frozen: tuple, spec: tuple) -> tuple:
        keys = jax.random.split(key, len(members))
        return tuple(m.init(k, f, s) for m, k, f, s in zip(members, keys, frozen, spec, strict=True))

    def update(key: Key, state: tuple, frozen: tuple, batch: Batch) -> tuple[tuple, dict]:
        keys = jax.random.split(key, len(members))
        parts = zip(members, keys, state, frozen, batch.x, strict=True)
        return tuple(m.stages[0].update(k, s, f, batch._replace(x=x))[0] for m, k, s, f, x in parts), {}

    def finalize(key: Key, state: tuple, frozen: tuple) -> tuple:
        keys = jax.random.split(key, len(members))
        return tuple(m.stages[0].finalize(k, s, f) for m, k, s, f in zip(members, keys, state, frozen, strict=True))

    def score(state: tuple, frozen: tuple, x: tuple) -> Scores:
        scores: list[Any] = [m.score(s, f, v) for m, s, f, v in zip(members, state, frozen, x, strict=True)]
        scale = [1 / (_spread(s) * len(members)) for s in state]
        return jax.tree.map(lambda *v: sum(a * b for a, b in zip(v, scale, strict=True)), *scores)

    return Method(embed, init, (Stage("collect", update, finalize),), score)


def _spread(state: PatchcoreBank) -> Float[Array, ""]:
    """Root mean square distance of the bank to its mean; 1 for a bank of equal rows."""
    valid = (jnp.arange(state.bank.shape[0]) < state.size)[:, None]
    count = state.size.astype(jnp.float32)
    mean = jnp.where(valid, state.bank, 0).sum(0) / count
    spread = jnp.sqrt(jnp.where(valid, (state.bank - mean) ** 2, 0).sum() / count)
    return jnp.where(spread > 0, spread, 1)


def update(key: Key, bank: State, new: State, *, size: int | None = None, projection_dim: int | None = 128) -> State:
    """Adds the bank of new normal images to a fitted one, thinned again by the greedy selection.

    Args:
        key: Random key.
        bank: A fitted bank, or those of an ensemble.
        new: The bank fitted, with the same hyper-parameters, on the new images alone.
        size: Rows of the result, at most those of both; None keeps all.
        projection_dim: As in `patchcore`.

    Raises:
        ValueError: The banks hold features of different widths, or fewer rows than wanted.
    """
    if not isinstance(bank, PatchcoreBank):
        members = zip(jax.random.split(key, len(bank)), bank, new, strict=True)
        return tuple(update(k, old, more, size=size, projection_dim=projection_dim) for k, old, more in members)
    widths = bank.bank.shape[1], new.bank.shape[1]
    if widths[0] != widths[1]:
        raise ValueError(f"both banks must hold features of one width, got {widths[0]} and {widths[1]}")
    points = jnp.concatenate([bank.bank, new.bank])
    valid = jnp.concatenate([jnp.arange(b.bank.shape[0]) < b.size for b in (bank, new)])
    n = points.shape[0]
    k = n if size is None else size
    if not 1 <= k <= n:
        raise ValueError(f"size must be within 1..{n} (the rows of both banks), got {size}")
    thinned = _thin(key, points, valid, k, jnp.int32(k), projection_dim)
    return thinned._replace(radius=jnp.maximum(bank.radius, new.radius) + thinned.radius)
