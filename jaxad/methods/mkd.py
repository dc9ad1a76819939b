"""MKD: a small network learns the values and the directions of a teacher's activations at several depths.

Stored: a cloner, a narrow network in the manner of a VGG-16 with the teacher's channels where it is compared with it.
The loss adds, for every compared map, the mean squared difference (value) and the cosine distance of the maps as single
vectors (direction) (Eq. 1-3). An image scores the loss of all maps but the first; a pixel the size of the gradient of
that with respect to it, smoothed (section 3.2).

Paper: Multiresolution Knowledge Distillation for Anomaly Detection, CVPR 2021, arXiv:2011.11108.
Reference: https://github.com/rohban-lab/Knowledge_Distillation_AD
Differences: any backbone may teach; heat maps are neither clipped, nor scaled to [0, 1] image by image, nor opened
    morphologically, so that pixels of different images compare; images are normalized for the teacher; SmoothGrad
    averages gradients with their signs, and its noise, the same for all images, is a share of the range of pixels, as
    in its paper (arXiv:1706.03825), not of its inverse's square; convolutions with batch norm begin as a ResNet's do;
    steps are of full batches; the running variance is not corrected for the size of a batch.
Results: experiments/recipes/mkd.py
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jaxad.backbones import backbone as architecture
from jaxad.backbones import features, normalize, stride
from jaxad.base import Batch, Frozen, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.nn import ConvNorm
from jaxad.ops.cosine import cosine_distance
from jaxad.ops.heatmap import upsample_blur
from jaxad.training.checks import above_zero, at_least_one, zero_or_more
from jaxad.training.gradient import Trained, begin, descend_with, mean_of_valid, zero_padding

CONVOLUTIONS = (2, 2, 3, 3, 3)
"""Of a VGG-16 before each of its poolings."""


class MkdTraining(NamedTuple):
    """The cloner while it is trained."""

    trained: Trained
    running: PyTree
    """Statistics of its batch norms."""


class MkdCloner(NamedTuple):
    """The trained cloner."""

    params: PyTree
    running: PyTree


@jax.custom_vjp
def guided_relu(x: Array) -> Array:
    """A ReLU through which only positive gradients return (guided backpropagation, arXiv:1412.6806, section 3.4)."""
    return nn.relu(x)


def _only_positive(x: Array, gradient: Array) -> tuple[Array]:
    return (jnp.where(x > 0, nn.relu(gradient), 0),)


guided_relu.defvjp(lambda x: (nn.relu(x), x), _only_positive)


class Cloner(nn.Module):
    """Maps of the same shapes as some of a teacher's."""

    channels: tuple[int, ...]
    """Of the teacher's map after each pooling; 0 where there is none."""
    hidden: int
    activation: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], valid: Bool[Array, "b"] | None) -> list[Float[Array, "b _ _ _"]]:
        """The maps of a normalized image."""
        found = []
        for channels, count in zip(self.channels, CONVOLUTIONS, strict=False):
            for _ in range(count - 1):
                x = self.activation(ConvNorm(self.hidden, 3)(x, valid=valid))
            xavier = nn.initializers.xavier_uniform()
            x = nn.Conv(channels or self.hidden, (3, 3), use_bias=False, kernel_init=xavier)(x)
            x = nn.max_pool(self.activation(x), (2, 2), (2, 2))
            if channels:
                found.append(x)
        return found


def mkd(
    *,
    backbone: str = "vgg16",
    layers: tuple[str, ...] | None = None,
    image_size: tuple[int, int] = (128, 128),
    hidden: int = 16,
    value_weight: float = 0.5,
    localization: Literal["gradients", "smooth_grad", "guided_backprop"] = "gradients",
    samples: int = 50,
    noise: float = 0.05,
    epochs: int = 600,
    train_batch_size: int = 64,
    learning_rate: float = 1e-3,
    sigma: float = 4.0,
) -> Method:
    """MKD.

    Args:
        backbone: The teacher.
        layers: Its stages that are compared, of different strides; None for all but the first of a VGG (`pool2` to
            `pool5`), and for the pyramid of others (layer1 to layer3 of a ResNet).
        image_size: (height, width) of the images, multiples of the deepest stage's stride; that of the heat map.
        hidden: Channels of the cloner where it is not compared.
        value_weight: Weight of the squared differences beside the cosine distances (lambda).
        localization: The gradient that draws the heat map: plain, averaged over noisy images, or guided.
        samples: Noisy images of "smooth_grad".
        noise: Deviation of their noise, as a share of the range of pixels.
        epochs: Passes over the training images.
        train_batch_size: Images of a step.
        learning_rate: Of Adam.
        sigma: Smoothing of the heat map in pixels.

    Raises:
        ValueError: A hyper-parameter is out of its range.
    """
    at_least_one(hidden=hidden, samples=samples, epochs=epochs, train_batch_size=train_batch_size)
    above_zero(learning_rate=learning_rate)
    zero_or_more(value_weight=value_weight, noise=noise, sigma=sigma)
    gradients = ("gradients", "smooth_grad", "guided_backprop")
    if localization not in gradients:
        raise ValueError(f"localization must be one of {', '.join(gradients)}, got {localization}")
    network = architecture(backbone)
    if layers is None:
        known = network.stages[1:] if network.stages[0] == "pool1" else network.pyramid_layers
        layers = tuple({stride(network, layer): layer for layer in known}.values())
    embed = features(backbone, tuple(layers), image=True)
    layers = tuple(layer for layer in network.stages if layer in layers)
    optimizer = optax.adam(learning_rate)

    def cloner(x: PyTree, activation: Callable[[Array], Array] = nn.relu) -> Cloner:
        channels = {}
        for layer in layers:
            apart = image_size[0] / x[layer].shape[1]
            if apart != image_size[1] / x[layer].shape[2] or apart % 1:
                raise ValueError(
                    f"image_size must be multiples of the stride of {layer}, got {image_size} for a map of "
                    f"{x[layer].shape[1]} x {x[layer].shape[2]}"
                )
            if apart not in (2, 4, 8, 16, 32):
                raise ValueError(f"layers must have strides of 2, 4, 8, 16 or 32, got {layer} of stride {apart:g}")
            channels[round(math.log2(apart))] = x[layer].shape[-1]
        if len(channels) < len(layers):
            raise ValueError(f"layers must have different strides, got {', '.join(layers)}")
        return Cloner(tuple(channels.get(i + 1, 0) for i in range(max(channels))), hidden, activation)

    def discrepancy(found: list[Array], teacher: dict[str, Array], among: tuple[str, ...]) -> Float[Array, "b"]:
        """Directions and values that differ, for every image (Eq. 1-3)."""
        total = jnp.zeros(len(found[0]))
        for own, layer in zip(found[-len(among) :], among, strict=True):
            a, b = (leaf.reshape(len(leaf), -1) for leaf in (own, teacher[layer]))
            total = total + cosine_distance(a, b) + value_weight * jnp.mean((a - b) ** 2, -1)
        return total

    def init(key: Key, frozen: Frozen, spec: PyTree) -> MkdTraining:
        del frozen
        variables = cloner(spec).init(key, jnp.zeros((1, *image_size, 3)), jnp.ones(1, bool))
        return MkdTraining(begin(optimizer, variables["params"]), variables["batch_stats"])

    def train(key: Key, state: MkdTraining, frozen: Frozen, batch: Batch) -> tuple[MkdTraining, Metrics]:
        del key
        x = zero_padding(batch.x, batch.valid)
        image = normalize(frozen, x["image"], jnp.float32)

        def loss(params: PyTree) -> Any:
            variables = {"params": params, "batch_stats": state.running}
            found, new = cloner(x).apply(variables, image, batch.valid, mutable=["batch_stats"])
            return mean_of_valid(discrepancy(found, x, layers), batch.valid), new["batch_stats"]

        trained, metrics, running = descend_with(optimizer, state.trained, loss)
        return MkdTraining(trained, running), metrics

    def finish(key: Key, state: MkdTraining, frozen: Frozen) -> MkdCloner:
        del key, frozen
        return MkdCloner(state.trained.params, state.running)

    def score(state: MkdCloner, frozen: Frozen, x: dict[str, Array]) -> Scores:
        variables = {"params": state.params, "batch_stats": state.running}
        among = layers[1:] or layers
        activation = guided_relu if localization == "guided_backprop" else nn.relu

        def differ(image: Array, teacher: dict[str, Array]) -> Float[Array, "b"]:
            found: Any = cloner(x, activation).apply(variables, normalize(frozen, image, jnp.float32), None)
            return discrepancy(found, teacher, among)

        image = x["image"].astype(jnp.float32) / 255
        gradient = jax.grad(lambda image: differ(image, network.apply(frozen, image, among)).sum())
        if localization == "smooth_grad":

            def add(total: Array, key: Key) -> tuple[Array, None]:  # the noise is the same for all images
                noisy = image + noise * jax.random.normal(key, image.shape[1:])
                return total + gradient(noisy), None

            keys = jax.random.split(jax.random.key(0), samples)
            found = jax.lax.scan(add, jnp.zeros_like(image), keys)[0] / samples
        else:
            found = gradient(image)
        pixel = upsample_blur(jnp.abs(found).sum(-1), image_size, sigma)
        return Scores(differ(image, x), pixel)

    stage = Stage("train", train, finish, epochs=epochs, batch_size=train_batch_size, shuffle=True)
    return Method(embed, init, (stage,), score)
