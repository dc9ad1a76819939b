"""CS-Flow: one fully convolutional normalizing flow of three image scales, which see each other.

Stored: a flow of couplings on the feature maps of the image at full, half and quarter size, whose networks exchange
what they see between neighboring scales (Eq. 3-4); trained so that the maps of normal images become a standard normal.
An image scores the mean of |z|^2 / 2 over all latent entries; the heat map is that of the finest scale's positions,
averaged over channels and upsampled (section 3.4).

Paper: Fully Convolutional Cross-Scale-Flows for Image-based Defect Detection, WACV 2022, arXiv:2110.02855.
Reference: https://github.com/marco-rudolph/cs-flow
Differences: epochs are counted plainly (240, not 4 of 60), and the last one counts, not the best on the test images;
    a last batch that is not full is left out; biases begin as zeros.
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

from jaxad.backbones import backbone as architecture
from jaxad.backbones import features
from jaxad.base import Batch, EmbedFn, Frozen, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.bijectors import CrossScaleCoupling, GlowNetworks, Permutation
from jaxad.nn.initial import torch_uniform
from jaxad.ops.heatmap import upsample_blur
from jaxad.training.checks import above_zero, at_least_one, zero_or_more
from jaxad.training.gradient import Trained, begin, descend, mean_of_valid, torch_adam, zero_padding

SCALES = 3
Maps = tuple[Array, ...]
"""Feature maps of all scales, the finest first."""


class CsflowTraining(NamedTuple):
    """The flow while it is trained."""

    trained: Trained
    permutations: tuple[tuple[Int[Array, "c"], ...], ...]
    """Of every block and scale."""


class CsflowFlow(NamedTuple):
    """The fitted flow."""

    params: PyTree
    permutations: tuple[tuple[Int[Array, "c"], ...], ...]


class CrossConvolutions(nn.Module):
    """Two convolutions a scale; what the first sees also reaches the scales above and below."""

    kernel: int
    hidden: int
    out: int

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Raw log scales and shifts, zero before the first step of training."""
        conv = functools.partial(nn.Conv, kernel_size=(self.kernel, self.kernel), kernel_init=torch_uniform)
        half = (self.kernel // 2, self.kernel // 2)
        seen = [nn.leaky_relu(conv(self.hidden)(scale), 0.1) for scale in x]
        made = []
        for i, here in enumerate(seen):
            total = conv(self.out)(here)
            if i > 0:
                total = total + conv(self.out, strides=2, padding=(half, half))(seen[i - 1])
            if i < len(seen) - 1:
                below = seen[i + 1]
                up = jax.image.resize(below, (*here.shape[:3], below.shape[-1]), "linear")
                total = total + conv(self.out)(up)
            made.append(total * self.param(f"gain{i}", nn.initializers.zeros, ()))
        return tuple(made)


@functools.lru_cache
def scales_of(backbone: str, layer: str) -> EmbedFn:
    """The `embed` of a stage's maps of an image at full, half and quarter size."""
    describe = features(backbone, (layer,))

    def embed(frozen: Frozen, image: Array) -> Maps:
        return tuple(describe(frozen, image[:, :: 2**i, :: 2**i])[layer] for i in range(SCALES))

    return embed


def csflow(
    *,
    backbone: str = "tf_efficientnet_b5",
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
        backbone: The network that describes images.
        layer: Its stage; None for the paper's of an EfficientNet ("blocks.5", stride 32), else for the deeper of those
            that describe patches (stride 16).
        image_size: (height, width) of the images, which is that of the heat map; multiples of four times the stride.
        coupling_blocks: Couplings of the flow.
        hidden: Channels within the couplings' networks.
        clamp: Bound of the couplings' log scales.
        epochs: Passes over the training images.
        train_batch_size: Images of a step.
        learning_rate: Of Adam.
        weight_decay: Of Adam, added to the gradient.

    Raises:
        ValueError: A hyper-parameter is out of its range.
    """
    at_least_one(coupling_blocks=coupling_blocks, hidden=hidden, epochs=epochs, train_batch_size=train_batch_size)
    above_zero(clamp=clamp, learning_rate=learning_rate)
    zero_or_more(weight_decay=weight_decay)
    network = architecture(backbone)
    usual = "blocks.5" if "stem" in network.stages else network.patch_layers[-1]
    layer = usual if layer is None else layer
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), torch_adam(learning_rate, weight_decay, eps=1e-4))
    kernels = (3,) * (coupling_blocks - 1) + (5,)

    def networks(c: int, kernel: int) -> GlowNetworks:
        return GlowNetworks(functools.partial(CrossConvolutions, kernel, hidden), c)

    def init(key: Key, frozen: Frozen, spec: PyTree) -> CsflowTraining:
        del frozen
        c, sizes = spec[0].shape[-1], [scale.shape[1:3] for scale in spec]
        if any((2 * b[0], 2 * b[1]) != a for a, b in itertools.pairwise(sizes)):
            raise ValueError(
                f"image_size must be a multiple of four times the stride of {layer}, got {image_size} with maps "
                f"of {', '.join(f'{h} x {w}' for h, w in sizes)}"
            )

        def part(n: int) -> Maps:
            return tuple(jnp.zeros((1, *s.shape[1:3], n)) for s in spec)

        keys = jax.random.split(key, (coupling_blocks, 2 + SCALES))
        params = tuple(networks(c, kernel).init(own[:2], part) for kernel, own in zip(kernels, keys, strict=True))
        permutations = tuple(tuple(jax.random.permutation(own, c) for own in block[2:]) for block in keys)
        return CsflowTraining(begin(optimizer, params), permutations)

    def latent(params: PyTree, permutations: tuple, x: Maps) -> tuple[Maps, Any]:
        c, chain = x[0].shape[-1], []
        for kernel, own, index in zip(kernels, params, permutations, strict=True):
            both = networks(c, kernel).conditioners(own)
            chain += [Permutation(index, 3), CrossScaleCoupling(both, c, clamp=clamp, kind="atan")]
        z: Any = x
        return distrax.Chain(chain[::-1]).forward_and_log_det(z)  # pyright: ignore[reportReturnType]

    def squares(z: Maps) -> Float[Array, "b"]:
        return sum((jnp.sum(scale**2, (1, 2, 3)) for scale in z[1:]), jnp.sum(z[0] ** 2, (1, 2, 3)))

    def entries(z: Maps) -> int:
        return sum(scale[0].size for scale in z)

    def train(key: Key, state: CsflowTraining, frozen: Frozen, batch: Batch) -> tuple[CsflowTraining, Metrics]:
        del key, frozen
        x = zero_padding(batch.x, batch.valid)

        def loss(params: PyTree) -> Float[Array, ""]:
            z, log_det = latent(params, state.permutations, x)
            return mean_of_valid(0.5 * squares(z) - log_det, batch.valid) / entries(z)

        trained, metrics = descend(optimizer, state.trained, loss)
        return state._replace(trained=trained), metrics

    def finish(key: Key, state: CsflowTraining, frozen: Frozen) -> CsflowFlow:
        del key, frozen
        return CsflowFlow(state.trained.params, state.permutations)

    def score(state: CsflowFlow, frozen: Frozen, x: Maps) -> Scores:
        del frozen
        z, _ = latent(state.params, state.permutations, x)
        pixel = upsample_blur(jnp.mean(z[0] ** 2, -1) / 2, image_size, 0.0)
        return Scores(squares(z) / (2 * entries(z)), pixel)

    stage = Stage("train", train, finish, epochs=epochs, batch_size=train_batch_size, shuffle=True)
    return Method(scales_of(backbone, layer), init, (stage,), score)
