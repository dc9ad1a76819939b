"""PatchCore: nearest neighbors of patch features in a coreset of the normal ones.

Stored: a memory bank of locally aware patch features (the 3x3 neighborhood mean of layer2 and layer3, stacked, Eq. 1-2
and 4 of section 3.1), thinned by greedy k-center selection on a random projection (section 3.2,
algorithm 1). A patch scores its distance to its nearest neighbors in the bank, an image the score of its worst patch
(Eq. 6), optionally re-weighted by how far the nearest bank entry lies from its own neighbors (Eq. 7). The heat map is
the upsampled patch scores, smoothed.
Memory: fitting on n images holds all patches, 4 * n * h * w * c bytes; 3 * 128 / c of that again for the projected
patches (plain, centered and in blocks); and the sampling ratio of that for the bank. With a `coreset_size` of k, the
bank is chosen while the images stream in (`jaxad.ops.coreset`): at most 4 k rows of 4 c bytes for each of L levels,
where L - 1 < log4(1 + 3 n h w / (4 k)), and at the end the same extra. Scoring holds the bank.

Family: features
Paper: Towards Total Recall in Industrial Anomaly Detection, CVPR 2022, arXiv:2106.08265.
Reference: https://github.com/amazon-science/patchcore-inspection (no re-weighting).
Differences: scores are distances (Eq. 6), not FAISS's squared ones (pixel AUROC on MTD: within 0.0002); the stacked
    channels stay as they are (1,536 for a ResNet-50) instead of being averaged in groups down to 1,024; the coreset is
    the exact greedy one, not one from 10 sampled starting points, in a Gaussian projection, not a uniform one; the
    scores of an ensemble's members are scaled by the spread of their banks, not by the minimum and maximum over the
    test set; with `coreset_size` the coreset is merged from coresets of parts of the stream, and depends on the order
    of the images. On 100 training and 100 test images of MTD, with a ResNet-50 and 2 % of the patches, three draws give
    image AUROCs of 0.851 to 0.854 and pixel AUROCs of 0.776 to 0.790; with averaged channels 0.850 to 0.878 and 0.743
    to 0.765; from sampled starting points 0.842 to 0.859 and 0.762 to 0.781.
Results: experiments/recipes/patchcore.py
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxad.backbones import Backbone, features
from jaxad.backbones import backbone as architecture
from jaxad.base import Batch, Frozen, Ignored, Key, Method, MonotoneMethod, PyTree, Scores, Stage, State, VaryFn
from jaxad.ops.collect import all_patches, collect, collect_positions, valid_first
from jaxad.ops.coreset import CoresetStream, coreset_centers, stream_finish, stream_init, stream_update
from jaxad.ops.heatmap import counted, patch_features, upsample_blur
from jaxad.ops.knn import Sketch, knn, sketch
from jaxad.training.checks import at_least_one

ROUNDED_FROM, ROUNDED_TO = 2048, 128
"""A bank of 2,048 rows or more has room for a multiple of 128 rows, so that common numbers of devices divide it."""
EXACT = 1 + 1e-6
"""A share of the patches is rounded down; one that is a whole number but for the rounding of float32 is that number."""


class PatchcorePatches(NamedTuple):
    """The patches of all training images while they are collected."""

    patches: Float[Array, "p n c"]
    seen: Bool[Array, "n"]


class PatchcoreBank(NamedTuple):
    """The memory bank."""

    bank: Float[Array, "m c"]
    """The first `size` rows count."""
    size: Int[Array, ""]
    radius: Float[Array, ""]
    """Largest distance of a training patch to the bank, in the projected space of the selection; an upper bound with
    `coreset_size` and after `update`, infinite after a change of the sampling ratio."""
    sketch: Sketch | None
    """Speeds up the search for neighbors; None for a small bank."""
    patches: Int[Array, ""]
    """Number of training patches from which the bank was chosen; 0, which is never read, with `coreset_size`."""
    neighbors: Int[Array, ""]
    """Number of neighbors whose distances a patch averages."""


def patchcore(
    *,
    backbone: str | Backbone | tuple[str | Backbone, ...] = "wide_resnet50_2",
    layers: tuple[str, ...] | None = None,
    image_size: tuple[int, int] = (224, 224),
    patch_size: int = 3,
    coreset_sampling_ratio: float = 0.1,
    coreset_size: int | None = None,
    projection_dim: int | None = 128,
    num_neighbors: int = 1,
    scoring: Literal["official", "paper"] = "official",
    reweight_neighbors: int = 9,
    sigma: float = 4.0,
) -> Method:
    """PatchCore.

    Args:
        backbone: The network that describes patches; several make an ensemble, whose `frozen` is a tuple.
        layers: Its stages, the finest first; None for the usual ones (layer2 and layer3 of a ResNet).
        image_size: (height, width) of the images and the heat maps.
        patch_size: Side of the neighborhood that a patch feature averages.
        coreset_sampling_ratio: Share of the patches kept, in (0, 1]; 1 keeps all.
        coreset_size: Number of patches kept, in place of the ratio; they are chosen as the images stream in, in memory
            for a few times that number. None collects all patches and keeps a share.
        projection_dim: Dimensions of the Gaussian random projection for the selection; None for no projection.
        num_neighbors: Neighbors whose mean distance a patch scores.
        scoring: "official" takes the maximum over patches, "paper" re-weights it (Eq. 7).
        reweight_neighbors: Neighbors of the nearest bank entry, itself included, in Eq. 7 (b).
        sigma: Smoothing of the heat map in pixels.

    Raises:
        ValueError: A hyperparameter is out of range.
    """
    if not 0 < coreset_sampling_ratio <= 1:
        raise ValueError(f"coreset_sampling_ratio must be in (0, 1], got {coreset_sampling_ratio}")
    if coreset_size is not None and coreset_size < 1:
        raise ValueError(f"coreset_size must be 1 or more, or None for a share of the patches, got {coreset_size}")
    at_least_one(patch_size=patch_size, num_neighbors=num_neighbors)
    if reweight_neighbors < 2:
        raise ValueError(f"reweight_neighbors must be 2 or more (the entry is the first), got {reweight_neighbors}")
    if projection_dim is not None and projection_dim < 1:
        raise ValueError(f"projection_dim must be 1 or more, or None for no projection, got {projection_dim}")
    if scoring not in ("official", "paper"):
        raise ValueError(f'scoring must be "official" or "paper", got "{scoring}"')
    one_backbone = functools.partial(
        _one_backbone,
        layers=layers,
        image_size=image_size,
        patch_size=patch_size,
        ratio=coreset_sampling_ratio,
        coreset_size=coreset_size,
        projection_dim=projection_dim,
        num_neighbors=num_neighbors,
        reweight=reweight_neighbors if scoring == "paper" else 0,
        sigma=sigma,
    )
    if isinstance(backbone, str | Backbone):
        return one_backbone(backbone)
    if not backbone:
        raise ValueError("an ensemble needs at least one backbone, got an empty tuple")
    return _ensemble(tuple(one_backbone(network) for network in backbone))


def _one_backbone(
    backbone: str | Backbone,
    layers: tuple[str, ...] | None,
    image_size: tuple[int, int],
    patch_size: int,
    ratio: float,
    coreset_size: int | None,
    projection_dim: int | None,
    num_neighbors: int,
    reweight: int,
    sigma: float,
) -> Method:
    layers = architecture(backbone).patch_layers if layers is None else tuple(layers)

    def describe(x: dict[str, Array]) -> Float[Array, "b h w c"]:
        return patch_features(x, layers, patch_size)

    def init(key: Key, state: None, frozen: Frozen, spec: PyTree) -> PatchcorePatches:
        del key, state, frozen
        n, h, w, c = jax.eval_shape(describe, spec).shape
        return PatchcorePatches(jnp.zeros((h * w, n, c)), jnp.zeros(n, bool))

    def update(key: Key, state: PatchcorePatches, frozen: Frozen, batch: Batch) -> tuple[PatchcorePatches, dict]:
        del key, frozen
        patches = describe(batch.x)
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        seen = collect(state.seen, batch.valid, batch)
        return PatchcorePatches(collect_positions(state.patches, patches, batch), seen), {}

    def select(key: Key, state: PatchcorePatches, frozen: Frozen) -> PatchcoreBank:
        del frozen
        p, n, c = state.patches.shape
        first_key, projection_key = jax.random.split(key)
        rank = jax.random.randint(first_key, (), 0, jnp.maximum(p * jnp.sum(state.seen, dtype=jnp.int32), 1))
        first = rank % p * n + jnp.searchsorted(jnp.cumsum(state.seen), rank // p + 1)
        patches, valid = all_patches(state.patches, state.seen)
        size = None if ratio == 1 else bank_size(ratio, valid.sum())
        project = _projection(projection_key, c, projection_dim)
        return _select(
            patches, valid, first, max(1, int(ratio * p * n * EXACT)), size, project, jnp.int32(num_neighbors)
        )

    def bank_size(ratio: float | Array, patches: Int[Array, ""]) -> Int[Array, ""]:
        return jnp.maximum((ratio * patches.astype(jnp.float32) * EXACT).astype(jnp.int32), 1)

    def with_ratio(state: PatchcoreBank, value: Array) -> PatchcoreBank:
        """The greedy selection is ordered: a smaller coreset is the head of a larger one."""
        size = jnp.minimum(bank_size(value, state.patches), state.size)
        valid, sketch = jnp.arange(state.bank.shape[0]) < size, state.sketch
        if sketch is not None:
            sizes, norms = (jnp.where(valid, part, jnp.inf) for part in (sketch.sizes, sketch.norms))
            sketch = sketch._replace(sizes=sizes, norms=norms)
        return state._replace(size=size, radius=jnp.full_like(state.radius, jnp.inf), sketch=sketch)

    def with_neighbors(state: PatchcoreBank, value: Array) -> PatchcoreBank:
        return state._replace(neighbors=value.astype(jnp.int32))

    def init_stream(key: Key, state: None, frozen: Frozen, spec: PyTree) -> CoresetStream:
        del state, frozen
        n, h, w, c = jax.eval_shape(describe, spec).shape
        return stream_init(n * h * w, min(coreset_size, n * h * w), c, _projection(key, c, projection_dim))

    def update_stream(key: Key, state: CoresetStream, frozen: Frozen, batch: Batch) -> tuple[CoresetStream, dict]:
        del key, frozen
        patches = describe(batch.x)
        _, h, w, c = patches.shape
        return stream_update(state, patches.reshape(-1, c), jnp.repeat(batch.valid, h * w)), {}

    def finish_stream(key: Key, state: CoresetStream, frozen: Frozen) -> PatchcoreBank:
        del frozen
        first_key, _ = jax.random.split(key)  # the same first center as in `select`
        first = jax.random.randint(first_key, (), 0, jnp.maximum(state.count.sum(), 1))
        return _bank(*stream_finish(state, first), jnp.int32(0), jnp.int32(num_neighbors))

    def score(state: PatchcoreBank, frozen: Frozen, x: dict[str, Array], ignore: Ignored = None) -> Scores:
        del frozen
        query = describe(x)
        b, h, w, c = query.shape
        valid = jnp.arange(state.bank.shape[0]) < state.size
        neighbors = min(num_neighbors, state.bank.shape[0])
        distance, index = knn(query.reshape(-1, c), state.bank, neighbors, valid, state.sketch)
        averaged = jnp.isfinite(distance) & (jnp.arange(neighbors) < state.neighbors)
        patch = jnp.where(averaged, distance, 0).sum(1) / averaged.sum(1).astype(jnp.float32)
        patch, nearest = patch.reshape(b, h * w), index[:, 0].reshape(b, h * w)
        worst = jnp.argmax(counted(patch.reshape(b, h, w), ignore).reshape(b, h * w), 1)
        image = jnp.take_along_axis(patch, worst[:, None], 1)[:, 0]
        if reweight:
            feature = jnp.take_along_axis(query.reshape(b, h * w, c), worst[:, None, None], 1)[:, 0]
            center = state.bank[jnp.take_along_axis(nearest, worst[:, None], 1)[:, 0]]
            image = image * _reweight(feature, center, state.bank, valid, min(reweight, state.bank.shape[0]))
        return Scores(image, upsample_blur(patch.reshape(b, h, w), image_size, sigma))

    embed = features(backbone, layers)
    if coreset_size is not None:
        vary: tuple = (("num_neighbors", with_neighbors),)
        return Method(embed, (Stage("collect", init_stream, update_stream, finish_stream),), score, vary)
    vary = (("num_neighbors", with_neighbors), *((("coreset_sampling_ratio", with_ratio),) if ratio < 1 else ()))
    keeps_all = ratio == 1 and num_neighbors == 1 and not reweight
    make = MonotoneMethod if keeps_all else Method
    return make(embed, (Stage("collect", init, update, select),), score, vary)


def _projection(key: Key, c: int, projection_dim: int | None) -> Float[Array, "c e"] | None:
    """A Gaussian random projection; None where it would not reduce the dimensions."""
    if projection_dim is None or projection_dim >= c:
        return None
    return jax.random.normal(key, (c, projection_dim)) / jnp.sqrt(jnp.float32(projection_dim))


def _select(
    points: Float[Array, "n c"],
    valid: Bool[Array, "n"],
    first: Int[Array, ""],
    k: int,
    size: Int[Array, ""] | None,
    project: Float[Array, "c e"] | None,
    neighbors: Int[Array, ""],
) -> PatchcoreBank:
    """The bank of a greedy coreset of `size` valid points, at most `k`; of all valid points where `size` is None."""
    n, count = points.shape[0], jnp.sum(valid, dtype=jnp.int32)
    if size is None:
        return _bank(valid_first(points, valid, k), count, jnp.zeros(()), count, neighbors)
    capacity = k if k < ROUNDED_FROM else min(-(-k // ROUNDED_TO) * ROUNDED_TO, n)
    centers = coreset_centers(points, capacity, first, valid, jnp.minimum(size, k), project)
    return _bank(*centers, count, neighbors)


def _bank(
    rows: Float[Array, "m c"],
    size: Int[Array, ""],
    radius: Float[Array, ""],
    patches: Int[Array, ""],
    neighbors: Int[Array, ""],
) -> PatchcoreBank:
    return PatchcoreBank(rows, size, radius, sketch(rows, jnp.arange(rows.shape[0]) < size), patches, neighbors)


def _reweight(
    feature: Float[Array, "b c"],
    center: Float[Array, "b c"],
    bank: Float[Array, "m c"],
    valid: Bool[Array, "m"],
    b: int,
) -> Float[Array, "b"]:
    """1 minus the softmax weight of the nearest bank entry among its b nearest in the bank (Eq. 7).

    A bank of one row has no such neighbors and gives 1: the scores are not re-weighted.
    """
    _, index = knn(center, bank, b, valid)
    distance = jnp.linalg.norm(feature[:, None] - bank[index], axis=-1)
    distance = jnp.where(valid[index], distance, -jnp.inf)
    nearest = jnp.linalg.norm(feature - center, axis=-1)
    weight = 1 - jnp.exp(nearest - jax.nn.logsumexp(distance, axis=1))
    return jnp.where(valid.sum() > 1, weight, 1)


def _ensemble(members: tuple[Method, ...]) -> Method:
    """Fits the members side by side and averages their scores, in units of the spread of their banks."""
    stages = tuple(m.stages[0] for m in members)

    def embed(frozen: tuple, image: Array) -> tuple:
        return tuple(m.embed(f, image) for m, f in zip(members, frozen, strict=True))

    def init(key: Key, state: None, frozen: tuple, spec: tuple) -> tuple:
        keys = jax.random.split(key, len(members))
        return tuple(stage.init(k, state, f, s) for stage, k, f, s in zip(stages, keys, frozen, spec, strict=True))

    def update(key: Key, state: tuple, frozen: tuple, batch: Batch) -> tuple[tuple, dict]:
        keys = jax.random.split(key, len(members))
        parts = zip(stages, keys, state, frozen, batch.x, strict=True)
        return tuple(stage.update(k, s, f, batch._replace(x=x))[0] for stage, k, s, f, x in parts), {}

    def finalize(key: Key, state: tuple, frozen: tuple) -> tuple:
        keys = jax.random.split(key, len(members))
        return tuple(stage.finalize(k, s, f) for stage, k, s, f in zip(stages, keys, state, frozen, strict=True))

    def score(state: tuple, frozen: tuple, x: tuple, ignore: Ignored = None) -> Scores:
        scores: list[Any] = [m.score(s, f, v, ignore) for m, s, f, v in zip(members, state, frozen, x, strict=True)]
        scale = [1 / (_spread(s) * len(members)) for s in state]
        return jax.tree.map(lambda *v: sum(a * b for a, b in zip(v, scale, strict=True)), *scores)

    def vary_all(name: str) -> VaryFn:
        return lambda state, value: tuple(dict(m.vary)[name](s, value) for m, s in zip(members, state, strict=True))

    vary = tuple((name, vary_all(name)) for name, _ in members[0].vary)
    return Method(embed, (Stage("collect", init, update, finalize),), score, vary)


def _spread(state: PatchcoreBank) -> Float[Array, ""]:
    """Root mean square distance of the bank to its mean; 1 where all rows are equal."""
    valid = (jnp.arange(state.bank.shape[0]) < state.size)[:, None]
    count = state.size.astype(jnp.float32)
    mean = jnp.where(valid, state.bank, 0).sum(0) / count
    spread = jnp.sqrt(jnp.where(valid, (state.bank - mean) ** 2, 0).sum() / count)
    return jnp.where(spread > 0, spread, 1)


def update(key: Key, bank: State, new: State, *, size: int | None = None, projection_dim: int | None = 128) -> State:
    """Adds the bank of new normal images to a fitted bank, and selects from both again.

    Args:
        key: Random key.
        bank: A fitted bank, or the banks of an ensemble.
        new: The bank of the new images only, fitted with the same hyperparameters.
        size: Rows of the result, at most those of both banks; None keeps all.
        projection_dim: As in `patchcore`.

    Raises:
        ValueError: The banks hold features of different widths, or fewer rows than `size`.
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
    if size is not None and not 1 <= size <= n:
        raise ValueError(f"size must be within 1..{n} (the rows of both banks), got {size}")
    first_key, projection_key = jax.random.split(key)
    rank = jax.random.randint(first_key, (), 0, jnp.maximum(jnp.sum(valid, dtype=jnp.int32), 1))
    first = jnp.searchsorted(jnp.cumsum(valid), rank + 1)
    k, target = (n, None) if size is None else (size, jnp.int32(size))
    project = _projection(projection_key, points.shape[1], projection_dim)
    selected = _select(points, valid, first, k, target, project, bank.neighbors)
    radius = jnp.maximum(bank.radius, new.radius) + selected.radius
    return selected._replace(radius=radius, patches=bank.patches + new.patches)
