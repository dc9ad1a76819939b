"""MKD: a small network learns the values and the directions of a teacher's activations at several depths.

Stored: a cloner, a narrow network in the style of VGG-16 that has the teacher's channels where the two are compared.
For every compared map, the loss adds the mean squared difference (value) and the cosine distance of the maps as single
vectors (direction) (Eq. 1-3). An image scores the loss over all maps but the first. A pixel scores the magnitude of
the gradient of that loss with respect to it, smoothed (section 3.2).

Family: distillation
Paper: Multiresolution Knowledge Distillation for Anomaly Detection, CVPR 2021, arXiv:2011.11108.
Reference: https://github.com/rohban-lab/Knowledge_Distillation_AD
Differences: any backbone can teach; heat maps are not clipped, scaled to [0, 1] per image or opened morphologically, so
    that pixels of different images compare (on MVTec's bottle at 64 px, a ResNet-18, 15 epochs: clipping and scaling
    take the pixel AUROC from 0.934 to 0.875); images are normalized for the teacher, as the reference does for CIFAR-10
    but not for MVTec (image AUROC 0.983, pixel AUROC 0.934, instead of 0.985 and 0.954); SmoothGrad averages gradients
    with their signs, and its noise, the same for all images, is a share of the pixel range, as in its paper
    (arXiv:1706.03825), not of the inverse square of that range; every step takes a full batch; running variances are
    biased (torch's are not: 4e-6 of a score after three steps).
Results: experiments/recipes/mkd.py
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float

from jaxad.backbones import Backbone, features, normalize, stride
from jaxad.backbones import backbone as architecture
from jaxad.base import Batch, Frozen, Key, Method, PyTree, Scores
from jaxad.nn import ConvNorm
from jaxad.ops.cosine import cosine_distance
from jaxad.ops.heatmap import upsample_blur
from jaxad.training import gradient_stage
from jaxad.training.checks import above_zero, at_least_one, zero_or_more

CONVOLUTIONS = (2, 2, 3, 3, 3)
"""Convolutions of a VGG-16 before each of its pooling layers."""


class MkdCloner(NamedTuple):
    """The cloner."""

    params: PyTree
    stats: PyTree
    """Running statistics of its batch norms."""


@jax.custom_vjp
def guided_relu(x: Array) -> Array:
    """A ReLU that passes only positive gradients back (guided backpropagation, arXiv:1412.6806, section 3.4)."""
    return nn.relu(x)


def _only_positive(x: Array, gradient: Array) -> tuple[Array]:
    return (jnp.where(x > 0, nn.relu(gradient), 0),)


guided_relu.defvjp(lambda x: (nn.relu(x), x), _only_positive)


class Cloner(nn.Module):
    """A network whose maps have the shapes of some of the teacher's."""

    channels: tuple[int, ...]
    """Channels of the teacher's map after each pooling; 0 where none is compared."""
    hidden: int
    activation: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], *, train: bool) -> list[Float[Array, "b _ _ _"]]:
        """The compared maps of a normalized image."""
        maps, xavier = [], nn.initializers.xavier_uniform()
        for channels, count in zip(self.channels, CONVOLUTIONS, strict=False):
            for _ in range(count - 1):
                x = self.activation(ConvNorm(self.hidden, 3, kernel_init=xavier)(x, train=train))
            x = nn.Conv(channels or self.hidden, (3, 3), use_bias=False, kernel_init=xavier)(x)
            x = nn.max_pool(self.activation(x), (2, 2), (2, 2))
            if channels:
                maps.append(x)
        return maps


def mkd(
    *,
    backbone: str | Backbone = "vgg16",
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
        layers: The stages to compare, of different strides; None for all but the first of a VGG (`pool2` to `pool5`),
            and for the pyramid of other backbones (layer1 to layer3 of a ResNet).
        image_size: (height, width) of the images and of the heat map, multiples of the deepest stage's stride.
        hidden: Channels of the cloner where it is not compared.
        value_weight: Weight of the squared differences relative to the cosine distances (lambda).
        localization: The gradient behind the heat map: plain, averaged over noisy images, or guided.
        samples: Noisy images of "smooth_grad".
        noise: Standard deviation of their noise, as a share of the pixel range.
        epochs: Passes over the training images.
        train_batch_size: Images per step.
        learning_rate: Of Adam.
        sigma: Smoothing of the heat map in pixels.

    Raises:
        ValueError: A hyperparameter is out of range.
    """
    at_least_one(hidden=hidden, samples=samples, epochs=epochs, train_batch_size=train_batch_size)
    above_zero(learning_rate=learning_rate)
    zero_or_more(value_weight=value_weight, noise=noise, sigma=sigma)
    gradients = ("gradients", "smooth_grad", "guided_backprop")
    if localization not in gradients:
        raise ValueError(f"localization must be one of {', '.join(gradients)}, got {localization}")
    network = architecture(backbone)
    if layers is None:
        candidates = network.stages[1:] if network.family == "vgg" else network.pyramid_layers
        layers = tuple({stride(network, layer): layer for layer in candidates}.values())
    embed = features(backbone, tuple(layers), image=True)
    layers = tuple(layer for layer in network.stages if layer in layers)
    scored = layers[1:] or layers

    def cloner(x: PyTree, activation: Callable[[Array], Array] = nn.relu) -> Cloner:
        channels = {}
        for layer in layers:
            (h, w), c = x[layer].shape[1:3], x[layer].shape[-1]
            factor = image_size[0] / h
            if factor != image_size[1] / w or factor % 1:
                raise ValueError(
                    f"image_size must be multiples of the stride of {layer}, got {image_size} for a map of {h} x {w}"
                )
            if factor not in (2, 4, 8, 16, 32):
                raise ValueError(f"layers must have strides of 2, 4, 8, 16 or 32, got {layer} of stride {factor:g}")
            channels[round(math.log2(factor))] = c
        if len(channels) < len(layers):
            raise ValueError(f"layers must have different strides, got {', '.join(layers)}")
        return Cloner(tuple(channels.get(i + 1, 0) for i in range(max(channels))), hidden, activation)

    def discrepancy(maps: list[Array], teacher: dict[str, Array], compared: tuple[str, ...]) -> Float[Array, "b"]:
        """The differences of direction and value over some of the layers, for every image (Eq. 1-3)."""
        total = jnp.zeros(len(maps[0]))
        for student, layer in zip(maps[-len(compared) :], compared, strict=True):
            a, b = (leaf.reshape(len(leaf), -1) for leaf in (student, teacher[layer]))
            total = total + cosine_distance(a, b) + value_weight * jnp.mean((a - b) ** 2, -1)
        return total

    def init(key: Key, state: None, frozen: Frozen, spec: PyTree) -> MkdCloner:
        del state, frozen
        variables = cloner(spec).init(key, jnp.zeros((1, *image_size, 3)), train=True)
        return MkdCloner(variables["params"], variables["batch_stats"])

    def loss(params: PyTree, model: MkdCloner, key: Key, frozen: Frozen, batch: Batch) -> tuple[Array, dict]:
        del key
        image = normalize(frozen, batch.x["image"], jnp.float32)
        variables = {"params": params, "batch_stats": model.stats}
        maps, changes = cloner(batch.x).apply(variables, image, train=True, mutable=["batch_stats"])
        return discrepancy(maps, batch.x, layers).mean(), {"stats": changes["batch_stats"]}

    def score(state: MkdCloner, frozen: Frozen, x: dict[str, Array]) -> Scores:
        variables = {"params": state.params, "batch_stats": state.stats}
        student = cloner(x, guided_relu if localization == "guided_backprop" else nn.relu)

        def image_scores(image: Array, teacher: dict[str, Array]) -> Float[Array, "b"]:
            maps: Any = student.apply(variables, normalize(frozen, image, jnp.float32), train=False)
            return discrepancy(maps, teacher, scored)

        image = x["image"].astype(jnp.float32) / 255
        gradient_of = jax.grad(lambda image: image_scores(image, network.apply(frozen, image, scored)).sum())
        if localization == "smooth_grad":

            def add(total: Array, key: Key) -> tuple[Array, None]:
                noisy = image + noise * jax.random.normal(key, image.shape[1:])  # the same noise for all images
                return total + gradient_of(noisy), None

            keys = jax.random.split(jax.random.key(0), samples)
            gradient = jax.lax.scan(add, jnp.zeros_like(image), keys)[0] / samples
        else:
            gradient = gradient_of(image)
        pixel = upsample_blur(jnp.abs(gradient).sum(-1), image_size, sigma)
        return Scores(image_scores(image, x), pixel)

    optimizer = optax.adam(learning_rate)
    stage = gradient_stage("train", init, loss, optimizer, epochs=epochs, batch_size=train_batch_size)
    return Method(embed, (stage,), score)
