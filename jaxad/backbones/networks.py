"""Architectures by name, as pure functions of frozen weights."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxad.backbones import convolution, efficientnet, pdn, registry, resnet
from jaxad.base import EmbedFn, Frozen, Key


class Backbone(NamedTuple):
    """An architecture bound to its name; the weights (`frozen`) are an argument of `apply`."""

    name: str
    stages: tuple[str, ...]
    """Names of the feature maps, shallow to deep."""
    patch_layers: tuple[str, ...]
    """The stages that describe patches best (strides 8 and 16), the finest first."""
    pyramid_layers: tuple[str, ...]
    """The stages of a feature pyramid from stride 4 on, the finest first."""
    init: Callable[[Key], Frozen]
    """Random weights."""
    apply: Callable[[Frozen, Array, tuple[str, ...]], dict[str, Float[Array, "b _ _ _"]]]
    """(frozen, image, layers) -> the float32 feature maps of those stages; image b h w 3 of any size, uint8 or float in
    [0, 1]. Nothing past the deepest of them is computed. The network computes in the type of the weights."""
    fold: Callable[[Mapping[str, np.ndarray]], Frozen]
    """The tensors of a torch checkpoint -> frozen, batch norm folded into the convolutions. Stages past the deepest
    that the checkpoint holds may be missing, and are then missing from `frozen`; a tensor that is missing before it, or
    is of another shape or architecture, is a `ValueError`."""


def normalize(frozen: Frozen, image: Array, dtype: DTypeLike) -> Float[Array, "b h w 3"]:
    """Subtracts the mean and divides by the deviation that the weights were trained with (in units of 0..255)."""
    scale = 1.0 if image.dtype == jnp.uint8 else 255.0
    return ((image.astype(jnp.float32) * scale - frozen["mean"]) / frozen["std"]).astype(dtype)


def _network(entry: registry.Entry) -> tuple[nn.Module, Any]:
    """The network of an entry and the module with its `STAGES`, `PATCH_LAYERS` and `PYRAMID_LAYERS`."""
    if entry.architecture == "pdn_small":
        return pdn.PatchDescriptionNetwork(), pdn
    if entry.architecture in resnet.BLOCKS:
        return resnet.ResNet(entry.architecture, entry.stride_in_1x1), resnet
    return efficientnet.EfficientNet(entry.architecture), efficientnet


def shapes(name: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of a backbone's parameters: for every convolution those of its `kernel` (HWIO) and `bias`."""
    network, family = _network(registry.lookup(name))
    stages = family.STAGES
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(lambda key, image: network.init(key, image, stages), jax.random.key(0), image)
    return jax.tree.map(lambda leaf: leaf.shape, variables["params"])


def _fold(entry: registry.Entry, stages: tuple[str, ...], tensors: Mapping[str, np.ndarray]) -> convolution.Params:
    modules = shapes(entry.name)
    if entry.architecture == "pdn_small":
        wanted = {m: {f"{m}.{leaf}": shape for leaf, shape in leaves.items()} for m, leaves in modules.items()}
        convolution.held(stages, wanted, tensors)
        return pdn.fold(tensors)
    source = resnet.source
    if entry.architecture not in resnet.BLOCKS:
        source = functools.partial(efficientnet.source, entry.architecture, keys=tensors.keys())
    return convolution.fold(stages, {m: leaves["kernel"] for m, leaves in modules.items()}, source, tensors)


@functools.lru_cache
def backbone(name: str) -> Backbone:
    """The architecture of that name.

    Args:
        name: `resnet18/34/50/101/152`, `wide_resnet50_2`, `wide_resnet101_2`, `efficientnet_b0..b7`,
            `tf_efficientnet_b0..b7`, `pdn_small`, or one of them with a training recipe (`resnet50.caffe_in1k`).

    Raises:
        ValueError: There is no such backbone.
    """
    entry = registry.lookup(name)
    network, family = _network(entry)
    stages = family.STAGES

    def freeze(params) -> Frozen:
        mean, std = (np.asarray(values, np.float32) for values in entry.normalization)
        return {"params": params, "mean": mean, "std": std}

    @jax.jit
    def init(key: Key) -> Frozen:
        leaves = {(m, leaf): shape for m, group in shapes(name).items() for leaf, shape in group.items()}
        ends = np.cumsum([math.prod(shape) for shape in leaves.values()])
        params = {module: {} for module, _ in leaves}
        draws = jnp.split(jax.random.normal(key, (ends[-1],)), ends[:-1])
        for ((module, leaf), shape), values in zip(leaves.items(), draws, strict=True):
            scale = 0.0 if leaf == "bias" else math.sqrt(2 / math.prod(shape[:-1]))
            params[module][leaf] = values.reshape(shape) * scale
        return freeze(params)

    def apply(frozen: Frozen, image: Array, layers: tuple[str, ...]) -> dict[str, Float[Array, "b _ _ _"]]:
        _check(name, stages, layers)
        try:
            normalized = normalize(frozen, image, jax.tree.leaves(frozen["params"])[0].dtype)
            maps: Any = network.apply({"params": frozen["params"]}, normalized, tuple(layers))
        except flax.errors.ScopeParamNotFoundError:
            held = [stage for stage in stages if any(f"{m}.".startswith(f"{stage}.") for m in frozen["params"])]
            raise ValueError(
                f"the weights given for {name} hold only the stages {', '.join(held)}, got layers={tuple(layers)}; "
                "choose among them or give complete weights"
            ) from None
        return {layer: maps[layer].astype(jnp.float32) for layer in layers}

    def fold(tensors: Mapping[str, np.ndarray]) -> Frozen:
        try:
            return freeze(_fold(entry, stages, tensors))
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None

    return Backbone(name, stages, family.PATCH_LAYERS, family.PYRAMID_LAYERS, init, apply, fold)


def _check(name: str, stages: tuple[str, ...], layers: tuple[str, ...]) -> None:
    if not layers or not set(layers) <= set(stages):
        raise ValueError(f"{name} has the stages {', '.join(stages)}; choose one or more, got layers={tuple(layers)}")


@functools.lru_cache
def features(name: str, layers: tuple[str, ...], pool: bool = False) -> EmbedFn:
    """The `embed` of methods on pretrained features; the same arguments give the same function, so caches are shared.

    Args:
        name: A backbone.
        layers: Names of its stages.
        pool: Average every map over its positions.

    Returns:
        (frozen, image b h w 3) -> {layer: b h' w' c}, or {layer: b c} with `pool`; float32.

    Raises:
        ValueError: There is no such backbone or stage.
    """
    network = backbone(name)
    _check(name, network.stages, layers)

    def embed(frozen: Frozen, image: Array) -> dict[str, Array]:
        maps = network.apply(frozen, image, layers)
        return {k: v.mean((1, 2)) for k, v in maps.items()} if pool else maps

    return embed
