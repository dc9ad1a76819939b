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
from jaxtyping import Array, Bool, Float

from jaxad.backbones import convolution, efficientnet, patchnet, pdn, registry, resnet, transformer, vgg
from jaxad.base import EmbedFn, Frozen, Key, PyTree
from jaxad.nn import ConvNorm, without_norm
from jaxad.nn.initial import torch_bias, torch_uniform
from jaxad.ops.image import levels


class Backbone(NamedTuple):
    """An architecture bound to its name; the weights (`frozen`) are an argument of `apply`."""

    name: str
    stages: tuple[str, ...]
    """Names of the feature maps, shallow to deep."""
    patch_layers: tuple[str, ...]
    """The stages that describe patches best (strides 8 and 16), the finest first."""
    pyramid_layers: tuple[str, ...]
    """The stages of a feature pyramid from stride 4 on, the finest first; of a transformer, one stage of stride 16."""
    normalized: bool
    """Whether the maps have passed a layer norm of the network's own."""
    init: Callable[[Key], Frozen]
    """Random weights."""
    apply: Callable[[Frozen, Array, tuple[str, ...]], dict[str, Float[Array, "b _ _ _"]]]
    """(frozen, image, layers) -> the float32 feature maps of those stages; image b h w 3 of any size (for a
    transformer a multiple of 16), uint8 or float in [0, 1]. Nothing past the deepest of them is computed. The network
    computes in the type of the weights."""
    fold: Callable[[Mapping[str, np.ndarray]], Frozen]
    """The tensors of a torch checkpoint -> frozen, batch norm folded into the convolutions. Stages past the deepest
    that the checkpoint holds may be missing, and are then missing from `frozen`; a tensor that is missing before it, or
    is of another shape or architecture, is a `ValueError`."""


def normalize(frozen: Frozen, image: Array, dtype: DTypeLike) -> Float[Array, "b h w 3"]:
    """Subtracts the mean and divides by the deviation that the weights expect (in units of 0..255)."""
    scale = 1.0 if image.dtype == jnp.uint8 else 255.0
    return ((image.astype(jnp.float32) * scale - frozen["mean"]) / frozen["std"]).astype(dtype)


def stride(network: Backbone, layer: str) -> int:
    """Pixels between the positions of a stage, whatever it leaves out at the border."""
    frozen = jax.eval_shape(network.init, jax.eval_shape(jax.random.key, 0))

    def positions(side: int) -> int:
        image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        return jax.eval_shape(lambda f, x: network.apply(f, x, (layer,))[layer], frozen, image).shape[1]

    return 128 // (positions(256) - positions(128))


class _Network(NamedTuple):
    """The module of an architecture, and what `Backbone` says of it."""

    module: nn.Module
    stages: tuple[str, ...]
    patch_layers: tuple[str, ...]
    pyramid_layers: tuple[str, ...]
    normalized: bool = False


def _is_transformer(entry: registry.Entry) -> bool:
    return transformer.member(entry.architecture) in transformer.MEMBERS


def _network(entry: registry.Entry) -> _Network:
    name = entry.architecture
    if _is_transformer(entry):
        layers = transformer.default_layers(name)
        return _Network(transformer.Transformer(name), transformer.stages(name), layers, layers, normalized=True)
    if name in pdn.PUBLISHED:
        layers = pdn.PUBLISHED_STAGES
        return _Network(pdn.PublishedNetwork(name), layers, layers, layers)
    if name in patchnet.LAYERS:
        return _Network(patchnet.PatchNetwork(name), patchnet.STAGES, ("stride4",), ("stride4",))
    if name == "pdn_small":
        module, family = pdn.PatchDescriptionNetwork(), pdn
    elif name in vgg.ARCHITECTURES:
        module, family = vgg.Vgg(name), vgg
    elif name in resnet.BLOCKS:
        module, family = resnet.ResNet(name, entry.stride_in_1x1), resnet
    else:
        module, family = efficientnet.EfficientNet(name), efficientnet
    return _Network(module, family.STAGES, family.PATCH_LAYERS, family.PYRAMID_LAYERS)


@functools.lru_cache
def shapes(name: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of a backbone's parameters by layer, as of a convolution's `kernel` (HWIO) and `bias`."""
    network = _network(registry.lookup(name))
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    init = functools.partial(network.module.init, layers=network.stages)
    variables = jax.eval_shape(init, jax.random.key(0), image)
    return jax.tree.map(lambda leaf: leaf.shape, variables["params"])


def _fold(entry: registry.Entry, stages: tuple[str, ...], tensors: Mapping[str, np.ndarray]) -> convolution.Params:
    modules = shapes(entry.name)
    if _is_transformer(entry):
        return transformer.fold(entry.architecture, modules, tensors)
    if entry.architecture == "pdn_small":
        wanted = {m: {f"{m}.{leaf}": shape for leaf, shape in leaves.items()} for m, leaves in modules.items()}
        convolution.held(stages, wanted, tensors)
        return pdn.fold(tensors)
    if entry.architecture in resnet.BLOCKS:
        source = resnet.source
    elif entry.architecture in vgg.ARCHITECTURES:
        source = functools.partial(vgg.source, entry.architecture)
    elif entry.architecture in patchnet.LAYERS:
        source = patchnet.source
    else:
        family = pdn if entry.architecture in pdn.PUBLISHED else efficientnet
        source = functools.partial(family.source, entry.architecture, keys=tensors.keys())
    return convolution.fold(stages, {m: leaves["kernel"] for m, leaves in modules.items()}, source, tensors)


@functools.lru_cache
def backbone(name: str) -> Backbone:
    """The architecture of that name.

    Args:
        name: `resnet18/34/50/101/152`, `wide_resnet50_2`, `wide_resnet101_2`, `efficientnet_b0..b7`,
            `tf_efficientnet_b0..b7`, `vgg11/13/16/19` and the same with batch norm (`vgg16_bn`), a DeiT
            (`deit_base_distilled_patch16_384`), a CaiT (`cait_m48_448`), `pdn_small`, `efficientad_small/medium`,
            `patch17/33/65`, or one of them with a training recipe (`resnet50.caffe_in1k`).

    Raises:
        ValueError: There is no such backbone.
    """
    entry = registry.lookup(name)
    network = _network(entry)
    stages = network.stages

    mean, std = (np.asarray(values, np.float32) for values in entry.normalization)
    # Caffe's levels are not divided. A first convolution that learns from hundreds takes steps thousands of times as
    # long as one that learns from ones, so they are, and the convolution has the factor.
    scale = np.asarray(registry.IMAGENET[1], np.float32) if entry.normalization == registry.CAFFE else np.ones_like(std)

    def freeze(params) -> Frozen:
        return {"params": params, "mean": mean, "std": std * scale}

    @jax.jit
    def init(key: Key) -> Frozen:
        leaves = {(m, leaf): shape for m, group in shapes(name).items() for leaf, shape in group.items()}
        ends = np.cumsum([math.prod(shape) for shape in leaves.values()])
        params = {module: {} for module, _ in leaves}
        draws = jnp.split(jax.random.normal(key, (ends[-1],)), ends[:-1])
        for ((module, leaf), shape), values in zip(leaves.items(), draws, strict=True):
            deviation = 0.0 if leaf in ("bias", "scale") else math.sqrt(2 / math.prod(shape[:-1]))
            params[module][leaf] = values.reshape(shape) * deviation + float(leaf == "scale")
        return freeze(params)

    def apply(frozen: Frozen, image: Array, layers: tuple[str, ...]) -> dict[str, Float[Array, "b _ _ _"]]:
        _check(name, stages, layers)
        try:
            normalized = normalize(frozen, image, jax.tree.leaves(frozen["params"])[0].dtype)
            maps: Any = network.module.apply({"params": frozen["params"]}, normalized, tuple(layers))
        except flax.errors.ScopeParamNotFoundError:
            held = [stage for stage in stages if any(f"{m}.".startswith(f"{stage}.") for m in frozen["params"])]
            raise ValueError(
                f"the weights given for {name} hold only the stages {', '.join(held)}, got layers={tuple(layers)}; "
                "choose among them or give complete weights"
            ) from None
        return {layer: maps[layer].astype(jnp.float32) for layer in layers}

    def fold(tensors: Mapping[str, np.ndarray]) -> Frozen:
        try:
            params = _fold(entry, stages, tensors)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
        if (scale != 1).any():
            params = params | {"conv1": params["conv1"] | {"kernel": params["conv1"]["kernel"] * scale[:, None]}}
        return freeze(params)

    return Backbone(name, *network[1:], init, apply, fold)


def residual_blocks(name: str) -> resnet.ResidualBlocks:
    """Those of a ResNet.

    Raises:
        ValueError: There is no such backbone, or it is no ResNet.
    """
    architecture = registry.lookup(name).architecture
    if architecture not in resnet.BLOCKS:
        raise ValueError(f"the backbone must be a ResNet, got {name}")
    return resnet.BLOCKS[architecture]


class Student(NamedTuple):
    """A backbone that is trained from scratch; a ResNet has batch norm."""

    init: Callable[[Key], PyTree]
    """Variables: parameters, and the running statistics of the batch norms."""
    apply: Callable[[PyTree, Frozen, Array, Bool[Array, "b"] | None], tuple[dict[str, Float[Array, "b _ _ _"]], PyTree]]
    """(variables, frozen, image, valid) -> the maps of the stages as in training, and the new running statistics. Of
    `frozen` only the normalization of images is used; what is not valid does not count (None: as when scoring)."""
    freeze: Callable[[PyTree], PyTree]
    """Variables -> parameters of the backbone of that name, which gives the maps by the running statistics."""


@functools.lru_cache
def student(name: str, layers: tuple[str, ...], copies: int = 1) -> Student:
    """An untrained network of a backbone's architecture, up to the deepest of some stages.

    Args:
        name: A ResNet, or a patch-description network.
        layers: Names of its stages.
        copies: The description of EfficientAD's networks or of `pdn_small` has so many times its channels.

    Raises:
        ValueError: There is no such backbone or stage, or it is of another kind.
    """
    entry = registry.lookup(name)
    _check(name, _network(entry).stages, layers)
    trained = functools.partial(convolution.Conv, kernel_init=torch_uniform, bias_init=torch_bias)
    normed = False
    if copies > 1 and entry.architecture not in ("pdn_small", *pdn.PUBLISHED):
        raise ValueError(f"the backbone must be pdn_small, {' or '.join(pdn.PUBLISHED)}, got {name}")
    if entry.architecture == "pdn_small":
        module = pdn.PatchDescriptionNetwork(copies * pdn.OUT, trained)
    elif entry.architecture in pdn.PUBLISHED:
        module = pdn.PublishedNetwork(entry.architecture, copies * pdn.OUT, trained)
    elif entry.architecture in patchnet.LAYERS:
        module = patchnet.PatchNetwork(entry.architecture, functools.partial(trained, shifted=True))
    else:
        residual_blocks(name)  # raises for what is no ResNet
        module, normed = resnet.ResNet(entry.architecture, entry.stride_in_1x1, ConvNorm), True

    def init(key: Key) -> PyTree:
        options: dict[str, Any] = {"valid": jnp.ones(1, bool)} if normed else {}
        return module.init(key, jnp.zeros((1, 64, 64, 3)), layers, **options)

    def apply(variables: PyTree, frozen: Frozen, image: Array, valid: Array | None) -> Any:
        x = normalize(frozen, image, jnp.float32)
        if not normed:
            return module.apply(variables, x, layers), {}
        maps, new = module.apply(variables, x, layers, valid=valid, mutable=["batch_stats"])
        return maps, new["batch_stats"]

    return Student(init, apply, without_norm if normed else lambda variables: variables["params"])


def _check(name: str, stages: tuple[str, ...], layers: tuple[str, ...]) -> None:
    if not layers or not set(layers) <= set(stages):
        raise ValueError(f"{name} has the stages {', '.join(stages)}; choose one or more, got layers={tuple(layers)}")


@functools.lru_cache
def features(name: str, layers: tuple[str, ...], pool: bool = False, image: bool = False) -> EmbedFn:
    """The `embed` of methods on pretrained features; the same arguments give the same function, so caches are shared.

    Args:
        name: A backbone.
        layers: Names of its stages.
        pool: Average every map over its positions.
        image: Give the image too, as 256 levels, for methods with a network of their own that sees it.

    Returns:
        (frozen, image b h w 3) -> {layer: b h' w' c}, or {layer: b c} with `pool`; float32; and "image": b h w 3.

    Raises:
        ValueError: There is no such backbone or stage.
    """
    network = backbone(name)
    _check(name, network.stages, layers)

    def embed(frozen: Frozen, given: Array) -> dict[str, Array]:
        maps = network.apply(frozen, given, layers)
        own = {"image": levels(given)} if image else {}
        return own | ({k: v.mean((1, 2)) for k, v in maps.items()} if pool else maps)

    return embed
