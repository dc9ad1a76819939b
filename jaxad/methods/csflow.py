"""CS-Flow: one fully convolutional normalizing flow of three image scales, which exchange information.

Stored: a flow of couplings on the feature maps of the image at full, half and quarter size, whose networks pass
features between neighboring scales (Eq. 3-4); trained to map those of normal images to a standard normal. An image
scores the mean of z^2 / 2 over all latent entries; the heat map is the mean of z^2 over the channels at every position
of the finest scale, upsampled (section 3.4).

Family: flows
Paper: Fully Convolutional Cross-Scale-Flows for Image-based Defect Detection, WACV 2022, arXiv:2110.02855.
Reference: https://github.com/marco-rudolph/cs-flow
Differences: 240 plain epochs in place of 4 of 60, and the last one is kept, not the best on the test images; an
    incomplete last batch is dropped; latents are not cut off at 1e6.
Results: experiments/recipes/csflow.py
"""

import functools
import itertools
from typing import Any, NamedTuple

import distrax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxad.backbones import Backbone, features
from jaxad.backbones import backbone as architecture
from jaxad.base import Batch, EmbedFn, Frozen, Key, Method, PyTree, Scores, State
from jaxad.bijectors import CrossScaleCoupling, GlowNetworks, Permutation
from jaxad.nn.initial import torch_bias, torch_uniform
from jaxad.ops.heatmap import upsample_blur
from jaxad.training import gradient_stage
from jaxad.training.checks import above_zero, at_least_one, zero_or_more
from jaxad.training.optimizers import torch_adam

SCALES = 3
Maps = tuple[Array, ...]
"""Feature maps of all scales, the finest first."""


class CsflowFlow(NamedTuple):
    """The flow."""

    params: PyTree
    permutations: tuple[tuple[Int[Array, "c"], ...], ...]
    """Of the channels, for every block and scale."""


class CrossConvolutions(nn.Module):
    """Two convolutions per scale; the output of the first also reaches the scales above and below."""

    kernel: int
    hidden: int
    out: int

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Unbounded log scales and shifts, zero before the first step of training."""
        k = self.kernel

        def conv(x: Array, out: int, stride: int = 1) -> Array:
            init: Any = dict(kernel_init=torch_uniform, bias_init=torch_bias(k * k * x.shape[-1]))
            return nn.Conv(out, (k, k), stride, padding=k // 2, **init)(x)

        hidden = [nn.leaky_relu(conv(scale, self.hidden), 0.1) for scale in x]
        outputs = []
        for i, scale in enumerate(hidden):
            total = conv(scale, self.out)
            if i > 0:
                total = total + conv(hidden[i - 1], self.out, 2)
            if i < len(hidden) - 1:
                coarser = hidden[i + 1]
                upsampled = jax.image.resize(coarser, (*scale.shape[:3], coarser.shape[-1]), "linear")
                total = total + conv(upsampled, self.out)
            outputs.append(total * self.param(f"gain{i}", nn.initializers.zeros, ()))
        return tuple(outputs)


@functools.lru_cache
def features_of_scales(network: Backbone, layer: str) -> EmbedFn:
    """The `embed` that gives a stage's maps of an image at full, half and quarter size."""
    extract = features(network, (layer,))

    def embed(frozen: Frozen, image: Array) -> Maps:
        return tuple(extract(frozen, image[:, :: 2**i, :: 2**i])[layer] for i in range(SCALES))

    return embed


def csflow(
    *,
    backbone: str | Backbone = "tf_efficientnet_b5",
    layer: str | None = None,
    image_size: tuple[int, int] = (768, 768),
    coupling_blocks: int = 4,
    hidden: int = 1024,
    clamp: float = 3.0,
    epochs: int = 240,
    train_batch_size: int = 16,
    learning_rate: float = 2e-4,
    weight_decay: float = 1e-5,
) -> Method:
    """CS-Flow.

    Args:
        backbone: The network that extracts the features.
        layer: Its stage; None for the paper's of an EfficientNet ("blocks.5", stride 32), otherwise for the deeper of
            those that describe patches (stride 16).
        image_size: (height, width) of the images and of the heat map; multiples of four times the stride.
        coupling_blocks: Couplings of the flow.
        hidden: Hidden channels of the couplings' networks.
        clamp: Bound of the couplings' log scales.
        epochs: Passes over the training images.
        train_batch_size: Images per step.
        learning_rate: Of Adam.
        weight_decay: Of Adam, added to the gradient.

    Raises:
        ValueError: A hyperparameter is out of its range.
    """
    at_least_one(coupling_blocks=coupling_blocks, hidden=hidden, epochs=epochs, train_batch_size=train_batch_size)
    above_zero(clamp=clamp, learning_rate=learning_rate)
    zero_or_more(weight_decay=weight_decay)
    network = architecture(backbone)
    if layer is None:
        layer = "blocks.5" if network.family == "efficientnet" else network.patch_layers[-1]
    kernels = (3,) * (coupling_blocks - 1) + (5,)

    def networks(c: int, kernel: int) -> GlowNetworks:
        return GlowNetworks(functools.partial(CrossConvolutions, kernel, hidden), c)

    def init(key: Key, state: State, frozen: Frozen, spec: PyTree) -> CsflowFlow:
        del state, frozen
        c, sizes = spec[0].shape[-1], [scale.shape[1:3] for scale in spec]
        if any((2 * b[0], 2 * b[1]) != a for a, b in itertools.pairwise(sizes)):
            raise ValueError(
                f"image_size must be a multiple of four times the stride of {layer}, got {image_size} with maps "
                f"of {', '.join(f'{h} x {w}' for h, w in sizes)}"
            )

        def example(channels: int) -> Maps:
            return tuple(jnp.zeros((1, *scale.shape[1:3], channels)) for scale in spec)

        keys = jax.random.split(key, (coupling_blocks, 2 + SCALES))
        params = tuple(networks(c, kernel).init(k[:2], example) for kernel, k in zip(kernels, keys, strict=True))
        permutations = tuple(tuple(jax.random.permutation(k, c) for k in block_keys[2:]) for block_keys in keys)
        return CsflowFlow(params, permutations)

    def latent(params: PyTree, permutations: tuple, x: Maps) -> tuple[Maps, Any]:
        c, bijectors = x[0].shape[-1], []
        for kernel, block_params, indices in zip(kernels, params, permutations, strict=True):
            conditioners = networks(c, kernel).conditioners(block_params)
            bijectors += [Permutation(indices, 3), CrossScaleCoupling(conditioners, c, clamp=clamp, kind="atan")]
        maps: Any = x
        return distrax.Chain(bijectors[::-1]).forward_and_log_det(maps)  # pyright: ignore[reportReturnType]

    def squared_norm(z: Maps) -> Float[Array, "b"]:
        return sum((jnp.sum(scale**2, (1, 2, 3)) for scale in z[1:]), jnp.sum(z[0] ** 2, (1, 2, 3)))

    def entries(z: Maps) -> int:
        return sum(scale[0].size for scale in z)

    def loss(params: PyTree, model: CsflowFlow, key: Key, frozen: Frozen, batch: Batch) -> tuple[Array, dict]:
        del key, frozen
        z, log_det = latent(params, model.permutations, batch.x)
        return jnp.mean(0.5 * squared_norm(z) - log_det) / entries(z), {}

    def score(state: CsflowFlow, frozen: Frozen, x: Maps) -> Scores:
        del frozen
        z, _ = latent(state.params, state.permutations, x)
        pixel = upsample_blur(jnp.mean(z[0] ** 2, -1), image_size, 0.0)
        return Scores(squared_norm(z) / (2 * entries(z)), pixel)

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), torch_adam(learning_rate, weight_decay, eps=1e-4))
    stage = gradient_stage("train", init, loss, optimizer, epochs=epochs, batch_size=train_batch_size)
    return Method(features_of_scales(network, layer), (stage,), score)
