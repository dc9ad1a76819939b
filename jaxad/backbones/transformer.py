"""The vision transformers DeiT and CaiT in flax.linen, with patches of 16 pixels.

A stage is the map of the patch tokens after that block and the final norm of the network. DeiT's class and distillation
tokens take part in its attention and are then dropped; CaiT's class token enters after the blocks, in layers that are
never computed. For images of another size than in training the position embedding is resampled.

Paper: Training data-efficient image transformers & distillation through attention, ICML 2021, arXiv:2012.12877,
    Table 1; Going deeper with Image Transformers, ICCV 2021, arXiv:2103.17239, Sections 2 and 3;
    Talking-Heads Attention, 2020, arXiv:2003.02436.
Reference: timm.models.deit and timm.models.cait (parameter names, resampling).
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxad.backbones.architecture import Backbone, Family, build
from jaxad.backbones.convolution import Conv, Params, Shapes, complete_modules
from jaxad.backbones.registry import IMAGENET, Entry, Normalization

PATCH = 16
MEMBERS = {
    "deit_tiny": (192, 12, 3),
    "deit_small": (384, 12, 6),
    "deit_base": (768, 12, 12),
    "cait_xxs24": (192, 24, 4),
    "cait_xxs36": (192, 36, 4),
    "cait_xs24": (288, 24, 6),
    "cait_s24": (384, 24, 8),
    "cait_s36": (384, 36, 8),
    "cait_m36": (768, 36, 16),
    "cait_m48": (768, 48, 16),
}
"""Width, blocks and heads."""


class Layout(NamedTuple):
    """A vision transformer."""

    width: int
    depth: int
    """Number of blocks."""
    heads: int
    image_size: int
    """Height and width of the training images in pixels."""
    tokens: tuple[str, ...] = ()
    """Names of the tokens in front of the patches."""
    cait: bool = False
    """Talking heads and layer scales, as in CaiT."""


LAYOUTS = {
    f"deit_{size}{distilled}_patch16_{pixels}": Layout(*MEMBERS[f"deit_{size}"], pixels, tokens)
    for size in ("tiny", "small", "base")
    for distilled, tokens in (("", ("cls_token",)), ("_distilled", ("cls_token", "dist_token")))
    for pixels in (224, 384)
} | {
    f"{member}_{pixels}": Layout(*MEMBERS[member], pixels, cait=True)
    for member in MEMBERS
    if member.startswith("cait")
    for pixels in (224, 384, 448)
}
SUFFIXES = {"kernel": ".weight", "scale": ".weight", "bias": ".bias", "value": ""}
"""Suffix of the names in a torch checkpoint for each parameter of a module."""


def stages(layout: Layout) -> tuple[str, ...]:
    """The blocks, shallow to deep."""
    return tuple(f"blocks.{i}" for i in range(layout.depth))


def default_layers(layout: Layout) -> tuple[str, ...]:
    """The stage that FastFlow uses (arXiv:2111.07677, Table 6): block 7 of DeiT, block 40 of CaiT-M48.

    All stages have stride 16, so one serves as patch layer and as pyramid. In a smaller CaiT it is the block at the
    same relative depth, 20 of 24 or 30 of 36.
    """
    return (f"blocks.{layout.depth * 5 // 6 if layout.cait else min(7, layout.depth - 1)}",)


class Learned(nn.Module):
    """A single parameter: a token, a position embedding or a layer scale."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """The parameter, cast to `dtype`."""
        return jnp.asarray(self.param("value", nn.initializers.zeros, self.shape, jnp.float32), dtype)


class LayerNorm(nn.Module):
    """A layer norm over channels, computed in float32."""

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """The normalized tokens, in the type of `x`."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        y = x.astype(jnp.float32)
        y = (y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(y.var(-1, keepdims=True) + 1e-6)
        return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def resample(positions: Float[Array, "1 n c"], tokens: int, grid: tuple[int, int]) -> Float[Array, "1 m c"]:
    """The position embedding of another grid of patches, by antialiased cubic interpolation.

    Args:
        positions: The embedding of `tokens` tokens, followed by that of a square of patches.
        tokens: Number of tokens in front of the patches; their positions are kept.
        grid: Rows and columns of patches.
    """
    square, width = math.isqrt(positions.shape[1] - tokens), positions.shape[2]
    patches = positions[:, tokens:].reshape(1, square, square, width)
    patches = jax.image.resize(patches, (1, *grid, width), "cubic", antialias=True)
    return jnp.concatenate([positions[:, :tokens], patches.reshape(1, -1, width)], 1)


def attention(x: Float[Array, "b n c"], heads: int, talking: bool, prefix: str) -> Float[Array, "b n c"]:
    """Self-attention; talking heads are mixed linearly before and after the softmax."""
    b, n, width = x.shape
    qkv = nn.Dense(3 * width, name=prefix + "qkv")(x).reshape(b, n, 3, heads, -1)
    query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    mix, shape = "bhqk,hg->bgqk", (heads, heads)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query / math.sqrt(width // heads), key)
    if talking:
        logits = nn.Einsum(shape, mix, name=prefix + "proj_l")(logits)
    weights = jax.nn.softmax(logits.astype(jnp.float32), -1).astype(x.dtype)
    if talking:
        weights = nn.Einsum(shape, mix, name=prefix + "proj_w")(weights)
    y = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
    return nn.Dense(width, name=prefix + "proj")(y.reshape(b, n, width))


class Transformer(nn.Module):
    """Maps of a DeiT's or CaiT's patch tokens by stage name; nothing past the deepest requested stage is computed."""

    architecture: str
    """Its name, for messages."""
    layout: Layout

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], layers: tuple[str, ...]) -> dict[str, Float[Array, "b _ _ c"]]:
        """The maps of those stages of a normalized image.

        Raises:
            ValueError: Height or width is not a multiple of 16.
        """
        size = x.shape[1:3]
        if any(n % PATCH for n in size):
            nearest = tuple(max(PATCH, round(n / PATCH) * PATCH) for n in size)
            raise ValueError(
                f"{self.architecture} takes image sizes that are multiples of {PATCH}, got {size}: try {nearest}"
            )
        width, _, heads, image_size, tokens, cait = self.layout
        patches = (image_size // PATCH) ** 2

        x = Conv(width, PATCH, PATCH, same=True, name="patch_embed.proj")(x)
        b, *grid, _ = x.shape
        positions = Learned((1, len(tokens) + patches, width), name="pos_embed")(jnp.float32)
        leading = [Learned((1, 1, width), name=token)(x.dtype) for token in tokens]
        leading = [jnp.broadcast_to(token, (b, 1, width)) for token in leading]
        x = jnp.concatenate([*leading, x.reshape(b, -1, width)], 1)
        x = x + resample(positions, len(tokens), (grid[0], grid[1])).astype(x.dtype)

        blocks, norm, maps = stages(self.layout), LayerNorm(name="norm"), {}
        for stage in blocks[: max(map(blocks.index, layers)) + 1]:
            y = attention(LayerNorm(name=f"{stage}.norm1")(x), heads, cait, f"{stage}.attn.")
            x = x + (Learned((width,), name=f"{stage}.gamma_1")(x.dtype) * y if cait else y)
            y = nn.Dense(4 * width, name=f"{stage}.mlp.fc1")(LayerNorm(name=f"{stage}.norm2")(x))
            y = nn.Dense(width, name=f"{stage}.mlp.fc2")(jax.nn.gelu(y, approximate=False))
            x = x + (Learned((width,), name=f"{stage}.gamma_2")(x.dtype) * y if cait else y)
            if stage in layers:
                maps[stage] = norm(x[:, len(tokens) :]).reshape(b, *grid, width)
        return maps


def torch_shapes(modules: Mapping[str, Shapes]) -> dict[str, dict[str, tuple[int, ...]]]:
    """For every module the names and shapes of its tensors in timm's checkpoints, in the order of its parameters."""

    def torch_shape(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-3:-1], *shape[:-2]) if leaf == "kernel" else shape

    return {
        module: {module + SUFFIXES[leaf]: torch_shape(leaf, shape) for leaf, shape in leaves.items()}
        for module, leaves in modules.items()
    }


def fold(layout: Layout, modules: Mapping[str, Shapes], tensors: Mapping[str, np.ndarray]) -> Params:
    """Converts a checkpoint of timm's to flax parameters in float32.

    Args:
        layout: The network.
        modules: The shapes of the parameters of every module.
        tensors: The checkpoint; its deepest blocks may be missing; class attention and classifier are ignored.

    Raises:
        ValueError: The checkpoint is of another architecture, or not all of its numbers are finite.
    """
    names = torch_shapes(modules)
    known = {name for group in names.values() for name in group}
    for name, tensor in tensors.items():
        if name.startswith("blocks.") and name not in known:
            raise ValueError(f"has no tensor {name}, got one of shape {tuple(tensor.shape)}")
    params: Params = {}
    for module in complete_modules(stages(layout), names, tensors):
        params[module] = {}
        for leaf, name in zip(modules[module], names[module], strict=True):
            tensor = tensors[name].astype(np.float32)
            if not np.isfinite(tensor).all():
                raise ValueError(f"needs finite numbers, got others in {name}")
            params[module][leaf] = tensor.transpose(*range(2, tensor.ndim), 1, 0) if leaf == "kernel" else tensor
    return params


@functools.lru_cache
def make(name: str, layout: Layout, *, normalization: Normalization = IMAGENET) -> Backbone:
    """A DeiT or CaiT with a layout of the caller's own; equal arguments give the same object.

    Args:
        name: Name of the backbone, for messages.
        layout: Its sizes and tokens.
        normalization: Mean and deviation of the training images, RGB in 0..255.
    """
    layers = default_layers(layout)
    return build(
        name,
        "transformer",
        Transformer(name, layout),
        stages(layout),
        functools.partial(fold, layout),
        patch_layers=layers,
        pyramid_layers=layers,
        normalization=normalization,
        normalized=True,
    )


def _registered(name: str, entry: Entry) -> Backbone:
    return make(name, LAYOUTS[entry.architecture], normalization=entry.normalization)


FAMILY = Family(tuple(LAYOUTS), _registered)
