"""FastFlow: a fully convolutional normalizing flow on each level of a feature pyramid.

Stored: for every level a layer norm over channels and positions, and a flow of affine couplings whose networks
alternate between 3x3 and 1x1 convolutions, trained to map the features of normal images to a standard normal (Eq. 3-5).
A position of a level has the likelihood exp(-|z|^2 / 2 c) of its c latent channels; the heat map is 1 minus the mean of
the upsampled likelihoods of all levels, and an image scores the maximum of its heat map. The features of a transformer
have passed its own layer norm, so no other is learned. The published setting for `deit_base_distilled_patch16_384` and
`cait_m48_448` is 20 `flow_steps` of alternating 3x3 and 1x1, a `hidden_ratio` of 0.16 and images of 384 and 448 pixels.

Family: flows
Paper: FastFlow: Unsupervised Anomaly Detection and Localization via 2D Normalizing Flows, 2021, arXiv:2111.07677.
Reference: none official; https://github.com/gathierry/FastFlow (FrEIA's AllInOneBlock, layer norm, likelihoods).
Differences: alternating 3x3 and 1x1 needs an even number of couplings.
Results: experiments/recipes/fastflow.py
"""

import functools
from typing import Any, NamedTuple

import distrax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxad.backbones import Backbone, features
from jaxad.backbones import backbone as architecture
from jaxad.base import Batch, Frozen, Ignored, Key, Method, PyTree, Scores, State
from jaxad.bijectors import Permutation, Scan, affine_block, block_params
from jaxad.nn.initial import torch_bias, torch_uniform
from jaxad.ops.heatmap import counted, upsample_blur
from jaxad.training import gradient_stage
from jaxad.training.checks import above_zero, at_least_one, zero_or_more
from jaxad.training.optimizers import torch_adam


class FastflowFlows(NamedTuple):
    """The flows of all levels."""

    params: dict[str, PyTree]
    permutations: dict[str, Int[Array, "n k c"]]
    """Of the channels, for every pair of blocks (or block, with 3x3 convolutions only)."""


class Subnet(nn.Module):
    """Two convolutions of the same kernel size."""

    kernel: int
    hidden: int
    out: int

    @nn.compact
    def __call__(self, x: Float[Array, "*b h w c"]) -> Float[Array, "*b h w d"]:
        """Unbounded log scales and shifts."""
        return self.conv(nn.relu(self.conv(x, self.hidden)), self.out)

    def conv(self, x: Float[Array, "*b h w c"], out: int) -> Float[Array, "*b h w d"]:
        """A convolution with torch's initial values."""
        k = self.kernel
        return nn.Conv(out, (k, k), kernel_init=torch_uniform, bias_init=torch_bias(k * k * x.shape[-1]))(x)


def fastflow(
    *,
    backbone: str | Backbone = "wide_resnet50_2",
    layers: tuple[str, ...] | None = None,
    image_size: tuple[int, int] = (256, 256),
    flow_steps: int = 8,
    conv3x3_only: bool = False,
    hidden_ratio: float = 1.0,
    clamp: float = 2.0,
    epochs: int = 500,
    train_batch_size: int = 32,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-5,
) -> Method:
    """FastFlow.

    Args:
        backbone: The network that extracts the features.
        layers: Its stages, each with its own flow; None for its pyramid (layer1 to layer3 of a ResNet, one block of a
            transformer).
        image_size: (height, width) of the images and of the heat map.
        flow_steps: Couplings of each flow.
        conv3x3_only: Networks of 3x3 convolutions only (the reference's choice for a ResNet-18) instead of alternating
            3x3 and 1x1.
        hidden_ratio: Width of the networks divided by that of their input.
        clamp: Bound of the couplings' log scales.
        epochs: Passes over the training images.
        train_batch_size: Images per step.
        learning_rate: Of Adam.
        weight_decay: Of Adam, added to the gradient.

    Raises:
        ValueError: A hyperparameter is out of its range.
    """
    kernels = (3,) if conv3x3_only else (3, 1)
    at_least_one(flow_steps=flow_steps, epochs=epochs, train_batch_size=train_batch_size)
    if flow_steps % len(kernels):
        raise ValueError(f"flow_steps must be even, or conv3x3_only be set, got {flow_steps}")
    above_zero(hidden_ratio=hidden_ratio, clamp=clamp, learning_rate=learning_rate)
    zero_or_more(weight_decay=weight_decay)
    network = architecture(backbone)
    layers = network.pyramid_layers if layers is None else tuple(layers)

    def subnet(kernel: int, channels: int) -> Subnet:
        inputs = channels - channels // 2
        return Subnet(kernel, max(1, int(inputs * hidden_ratio)), 2 * (channels // 2))

    def init_level(key: Key, shape: tuple[int, ...]) -> tuple[PyTree, Int[Array, "n k c"]]:
        h, w, c = shape

        def init_blocks(key: Key) -> tuple[tuple, Int[Array, "k c"]]:
            subnet_keys, permutation_keys = jax.random.split(key, 2 * len(kernels)).reshape(2, -1)
            example = jnp.zeros((1, h, w, c - c // 2))
            subnets = (subnet(kernel, c).init(k, example) for kernel, k in zip(kernels, subnet_keys, strict=True))
            permutations = jax.vmap(lambda k: jax.random.permutation(k, c))(permutation_keys)
            return tuple(block_params(params, c) for params in subnets), permutations

        blocks, permutations = jax.vmap(init_blocks)(jax.random.split(key, flow_steps // len(kernels)))
        norm = {} if network.normalized else {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}
        return norm | {"blocks": blocks}, permutations

    def init(key: Key, state: State, frozen: Frozen, spec: PyTree) -> FastflowFlows:
        del state, frozen
        keys = jax.random.split(key, len(layers))
        levels = {layer: init_level(k, spec[layer].shape[1:]) for layer, k in zip(layers, keys, strict=True)}
        return FastflowFlows(
            {layer: params for layer, (params, _) in levels.items()},
            {layer: permutations for layer, (_, permutations) in levels.items()},
        )

    def flow(blocks: tuple, permutations: Int[Array, "n k c"]) -> distrax.Bijector:
        def consecutive_blocks(arrays: tuple) -> distrax.Bijector:
            params, indices = arrays
            bijectors = [
                affine_block(
                    p,
                    functools.partial(subnet(kernel, indices.shape[-1]).apply, p.subnet),
                    Permutation(indices[i], 3),
                    clamp=clamp,
                    event_ndims=3,
                )
                for i, (kernel, p) in enumerate(zip(kernels, params, strict=True))
            ]
            return distrax.Chain(bijectors[::-1])

        return Scan(consecutive_blocks, (blocks, permutations), 3)

    def latent(params: PyTree, permutations: Int[Array, "n k c"], x: Float[Array, "b h w c"]) -> tuple[Any, Any]:
        if not network.normalized:
            mean, variance = x.mean((1, 2, 3), keepdims=True), x.var((1, 2, 3), keepdims=True)
            x = (x - mean) * jax.lax.rsqrt(variance + 1e-5) * params["scale"] + params["bias"]
        return flow(params["blocks"], permutations).forward_and_log_det(x)

    def loss(params: PyTree, model: FastflowFlows, key: Key, frozen: Frozen, batch: Batch) -> tuple[Array, dict]:
        del key, frozen
        total = jnp.zeros(())
        for layer in layers:
            z, log_det = latent(params[layer], model.permutations[layer], batch.x[layer])
            total = total + 0.5 * jnp.sum(z**2, (1, 2, 3)) - log_det
        return total.mean(), {}

    def score(state: FastflowFlows, frozen: Frozen, x: dict[str, Array], ignore: Ignored = None) -> Scores:
        del frozen
        likelihoods = []
        for layer in layers:
            z, _ = latent(state.params[layer], state.permutations[layer], x[layer])
            likelihoods.append(upsample_blur(jnp.exp(-0.5 * jnp.mean(z**2, -1)), image_size, 0.0))
        pixel = 1 - sum(likelihoods[1:], likelihoods[0]) / len(layers)
        return Scores(counted(pixel, ignore).max((1, 2)), pixel)

    optimizer = torch_adam(learning_rate, weight_decay)
    stage = gradient_stage("train", init, loss, optimizer, epochs=epochs, batch_size=train_batch_size)
    return Method(features(backbone, layers), (stage,), score)
