"""What a backbone is, and how a family of architectures builds its members."""

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

from jaxad.backbones import registry
from jaxad.backbones.convolution import Params, Shapes
from jaxad.base import Frozen, Key, PyTree
from jaxad.nn import without_norm

Maps = dict[str, Float[Array, "b _ _ _"]]
"""Feature maps by stage."""


class ResidualBlocks(NamedTuple):
    """The residual blocks of a ResNet."""

    counts: tuple[int, int, int, int]
    """Blocks of every stage."""
    width: float = 0.25
    """Inner channels of a block as a share of its output channels; 1 makes basic blocks, less makes bottlenecks."""
    channels: int = 64
    """Channels of the stem, and of the first stage if its blocks are basic."""


class Student(NamedTuple):
    """A network of a backbone's architecture that is trained from scratch."""

    init: Callable[[Key], tuple[PyTree, PyTree]]
    """key -> (params, stats), the random initial parameters and batch-norm statistics ({} without batch norm)."""
    apply: Callable[..., tuple[Maps, PyTree]]
    """(params, stats, frozen, image, train) -> the feature maps and the new statistics. With `train` batch norm uses
    the statistics of the batch, otherwise `stats`. Of `frozen` only the normalization of images is read."""
    freeze: Callable[[PyTree, PyTree], PyTree]
    """(params, stats) -> parameters of the backbone itself, with batch norm folded into the convolutions."""


class Backbone(NamedTuple):
    """An architecture by name. It is hashable and holds no weights: those (`frozen`) are an argument of `apply`."""

    name: str
    family: str
    """The family of the architecture, a key of `FAMILIES` unless it is the caller's own."""
    stages: tuple[str, ...]
    """Names of the feature maps, shallow to deep."""
    patch_layers: tuple[str, ...]
    """The stages that describe patches best (strides 8 and 16), the finest first."""
    pyramid_layers: tuple[str, ...]
    """The stages of a feature pyramid from stride 4 on, the finest first; of a transformer, one stage of stride 16."""
    init: Callable[[Key], Frozen]
    """Random weights."""
    apply: Callable[[Frozen, Array, tuple[str, ...]], Maps]
    """(frozen, image, layers) -> the float32 feature maps of those stages; image b h w 3 of any size (for a
    transformer a multiple of 16), uint8 or float in [0, 1]. Nothing past the deepest of them is computed. The network
    computes in the type of the weights."""
    fold: Callable[[Mapping[str, np.ndarray]], Frozen]
    """The tensors of a torch checkpoint -> frozen, batch norm folded into the convolutions. Stages past the deepest
    that the checkpoint holds may be missing, and are then missing from `frozen`. Raises a `ValueError` if a tensor
    before it is missing, or one has another shape or belongs to another architecture."""
    normalized: bool = False
    """Whether the maps come out of a layer norm of the network."""
    pads: bool = True
    """Whether the network pads its input, so that its maps cover the image to the border."""
    patch_size: int | None = None
    """Height and width in pixels of the patch that a position describes, of a network of the family `patchnet`."""
    blocks: ResidualBlocks | None = None
    """The blocks of a ResNet."""
    student: Callable[[tuple[str, ...], int], Student] | None = None
    """(layers, copies) -> an untrained network up to the deepest of some stages; None: the family cannot be trained."""
    copies: bool = False
    """Whether the description that a student gives can have several times as many channels."""


class Family(NamedTuple):
    """A family of architectures: an entry of `FAMILIES`."""

    architectures: tuple[str, ...]
    """The registered architectures that it builds."""
    build: Callable[[str, registry.Entry], Backbone]
    """(name, entry of the registry) -> the backbone, which gets that name."""


def normalize(frozen: Frozen, image: Array, dtype: DTypeLike) -> Float[Array, "b h w 3"]:
    """Subtracts the mean that the weights expect and divides by the deviation (both in units of 0..255)."""
    scale = 1.0 if image.dtype == jnp.uint8 else 255.0
    return ((image.astype(jnp.float32) * scale - frozen["mean"]) / frozen["std"]).astype(dtype)


def check_layers(name: str, stages: tuple[str, ...], layers: tuple[str, ...]) -> None:
    """Raises ValueError unless `layers` names one or more of the stages of the backbone `name`."""
    if not layers or not set(layers) <= set(stages):
        raise ValueError(f"{name} has the stages {', '.join(stages)}; choose one or more, got layers={tuple(layers)}")


def build(
    name: str,
    family: str,
    module: nn.Module,
    stages: tuple[str, ...],
    fold: Callable[[Mapping[str, Shapes], Mapping[str, np.ndarray]], Params],
    *,
    patch_layers: tuple[str, ...] | None = None,
    pyramid_layers: tuple[str, ...] | None = None,
    normalization: registry.Normalization = registry.IMAGENET,
    **fields: Any,
) -> Backbone:
    """Builds a backbone from a flax module.

    Args:
        name: Name of the backbone.
        family: Name of its family.
        module: Takes (normalized image b h w 3, layers) and returns the maps of those stages. Its parameters are named
            `kernel`, `bias`, `scale` or otherwise, one level deep.
        stages: Names of the feature maps, shallow to deep. The parameters of a stage carry its name as a prefix.
        fold: (shapes of all parameters by module, tensors of a torch checkpoint) -> parameters; raises ValueError.
        patch_layers: As in `Backbone`; None: all stages.
        pyramid_layers: As in `Backbone`; None: all stages.
        normalization: Mean and deviation of the training images, RGB in 0..255.
        **fields: Other fields of `Backbone`.
    """
    mean, std = (np.asarray(values, np.float32) for values in normalization)

    def freeze(params: PyTree) -> Frozen:
        return {"params": params, "mean": mean, "std": std}

    @functools.cache
    def shapes() -> dict[str, dict[str, tuple[int, ...]]]:
        image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        variables = jax.eval_shape(functools.partial(module.init, layers=stages), jax.random.key(0), image)
        return jax.tree.map(lambda leaf: leaf.shape, variables["params"])

    @jax.jit
    def init(key: Key) -> Frozen:
        leaves = {(m, leaf): shape for m, group in shapes().items() for leaf, shape in group.items()}
        ends = np.cumsum([math.prod(shape) for shape in leaves.values()])
        params = {module: {} for module, _ in leaves}
        draws = jnp.split(jax.random.normal(key, (ends[-1],)), ends[:-1])
        for ((module, leaf), shape), values in zip(leaves.items(), draws, strict=True):
            deviation = 0.0 if leaf in ("bias", "scale") else math.sqrt(2 / math.prod(shape[:-1]))
            params[module][leaf] = values.reshape(shape) * deviation + float(leaf == "scale")
        return freeze(params)

    def apply(frozen: Frozen, image: Array, layers: tuple[str, ...]) -> Maps:
        check_layers(name, stages, layers)
        try:
            normalized = normalize(frozen, image, jax.tree.leaves(frozen["params"])[0].dtype)
            maps: Any = module.apply({"params": frozen["params"]}, normalized, tuple(layers))
        except flax.errors.ScopeParamNotFoundError:
            present = [stage for stage in stages if any(f"{m}.".startswith(f"{stage}.") for m in frozen["params"])]
            raise ValueError(
                f"the weights given for {name} hold only the stages {', '.join(present)}, got layers={tuple(layers)}; "
                "choose among them or give complete weights"
            ) from None
        return {layer: maps[layer].astype(jnp.float32) for layer in layers}

    def fold_checkpoint(tensors: Mapping[str, np.ndarray]) -> Frozen:
        try:
            return freeze(fold(shapes(), tensors))
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None

    return Backbone(
        name,
        family,
        stages,
        stages if patch_layers is None else patch_layers,
        stages if pyramid_layers is None else pyramid_layers,
        init,
        apply,
        fold_checkpoint,
        **fields,
    )


def make_student(module: nn.Module, layers: tuple[str, ...], batch_norm: bool = False) -> Student:
    """Builds a student from a flax module.

    Args:
        module: As for `build`, with initializers of its own.
        layers: The stages whose maps it gives.
        batch_norm: All convolutions of the module are `ConvNorm`s, and it passes `train` on to them.
    """

    def init(key: Key) -> tuple[PyTree, PyTree]:
        options: dict[str, Any] = {"train": False} if batch_norm else {}
        variables = module.init(key, jnp.zeros((1, 64, 64, 3)), layers, **options)
        return variables["params"], variables.get("batch_stats", {})

    def apply(params: PyTree, stats: PyTree, frozen: Frozen, image: Array, train: bool) -> tuple[Maps, PyTree]:
        x, variables = normalize(frozen, image, jnp.float32), {"params": params, "batch_stats": stats}
        if not batch_norm:
            maps: Any = module.apply(variables, x, layers)
            return maps, stats
        maps, changed = module.apply(variables, x, layers, train=train, mutable=["batch_stats"] if train else [])
        return maps, changed["batch_stats"] if train else stats

    def freeze(params: PyTree, stats: PyTree) -> PyTree:
        return without_norm({"params": params, "batch_stats": stats}) if batch_norm else params

    return Student(init, apply, freeze)
