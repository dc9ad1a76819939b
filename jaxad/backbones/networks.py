"""Backbones by name, and what methods make of them: features, students, strides."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxad.backbones import efficientnet, patchnet, pdn, registry, resnet, transformer, vgg
from jaxad.backbones.architecture import Backbone, ResidualBlocks, Student, check_layers
from jaxad.base import EmbedFn, Frozen
from jaxad.ops.image import levels

FAMILIES = {
    "resnet": resnet.FAMILY,
    "vgg": vgg.FAMILY,
    "efficientnet": efficientnet.FAMILY,
    "transformer": transformer.FAMILY,
    "pdn": pdn.FAMILY,
    "patchnet": patchnet.FAMILY,
}
"""The families of architectures. A new one is a file with a `FAMILY`, a line here, and its weights in the registry."""


def backbone(network: str | Backbone) -> Backbone:
    """The architecture of that name; a `Backbone` is returned as it is.

    Args:
        network: `resnet18/34/50/101/152`, `wide_resnet50_2`, `wide_resnet101_2`, `efficientnet_b0..b7`,
            `tf_efficientnet_b0..b7`, `vgg11/13/16/19` and the same with batch norm (`vgg16_bn`), a DeiT
            (`deit_base_distilled_patch16_384`), a CaiT (`cait_m48_448`), `pdn_small`, `efficientad_small/medium`,
            `patch17/33/65`, or one of them with a training recipe (`resnet50.caffe_in1k`). Or a member of a family
            with a layout of the caller's own, from `resnet.make`, `vgg.make`, `efficientnet.make`, `transformer.make`,
            `pdn.make` or `patchnet.make`, which need no registered name.

    Raises:
        ValueError: No backbone has that name.
    """
    return _registered(network) if isinstance(network, str) else network


@functools.lru_cache
def _registered(name: str) -> Backbone:
    entry = registry.lookup(name)
    family = next(family for family in FAMILIES.values() if entry.architecture in family.architectures)
    return family.build(name, entry)


def stride(network: str | Backbone, layer: str) -> int:
    """Pixels between neighboring positions of a stage, whether or not the network pads."""
    network = backbone(network)
    frozen = jax.eval_shape(network.init, jax.eval_shape(jax.random.key, 0))

    def positions(side: int) -> int:
        image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        return jax.eval_shape(lambda f, x: network.apply(f, x, (layer,))[layer], frozen, image).shape[1]

    return 128 // (positions(256) - positions(128))


def residual_blocks(network: str | Backbone) -> ResidualBlocks:
    """The blocks of a ResNet.

    Raises:
        ValueError: No backbone has that name, or it is no ResNet.
    """
    network = backbone(network)
    if network.blocks is None:
        raise ValueError(f"the backbone must be a ResNet, got {network.name}")
    return network.blocks


def student(network: str | Backbone, layers: tuple[str, ...], copies: int = 1) -> Student:
    """An untrained network of a backbone's architecture, up to the deepest of some stages.

    Args:
        network: A ResNet, a patch-description network (`pdn_small`, EfficientAD's) or a patch network.
        layers: Names of its stages.
        copies: How many times the channels of the backbone the description has; patch-description networks only.

    Raises:
        ValueError: No backbone or stage has that name, or the family makes no such student.
    """
    network = backbone(network)
    check_layers(network.name, network.stages, layers)
    if network.student is None:
        raise ValueError(f"the backbone must be {_registered_names('student')}, got {network.name}")
    if copies > 1 and not network.copies:
        raise ValueError(f"the backbone must be {_registered_names('copies')}, got {network.name}")
    return network.student(tuple(layers), copies)


def _registered_names(field: str) -> str:
    """The architectures with that field of `Backbone`, as a phrase."""
    names = dict.fromkeys(entry.architecture for entry in registry.ENTRIES.values())
    *first, last = (name for name in names if getattr(_registered(name), field))
    return f"{', '.join(first)} or {last}"


def features(network: str | Backbone, layers: tuple[str, ...], pool: bool = False, image: bool = False) -> EmbedFn:
    """The `embed` of methods on pretrained features; equal arguments give the same function, so caches are shared.

    Args:
        network: A backbone or the name of one.
        layers: Names of its stages.
        pool: Average every map over its positions.
        image: Also return the image in 256 levels, for methods that train a network on it.

    Returns:
        (frozen, image b h w 3) -> {layer: b h' w' c}, or {layer: b c} with `pool`; float32; and "image": b h w 3.

    Raises:
        ValueError: No backbone or stage has that name.
    """
    return _features(backbone(network), tuple(layers), pool, image)


@functools.lru_cache
def _features(network: Backbone, layers: tuple[str, ...], pool: bool, with_image: bool) -> EmbedFn:
    check_layers(network.name, network.stages, layers)

    def embed(frozen: Frozen, image: Array) -> dict[str, Array]:
        maps = network.apply(frozen, image, layers)
        if pool:
            maps = {layer: values.mean((1, 2)) for layer, values in maps.items()}
        return {"image": levels(image), **maps} if with_image else maps

    return embed
