"""DRAEM: one network paints synthetic anomalies out, another finds them in the image beside what was painted.

Stored: a reconstructive network, an encoder and decoder without links, that learns to give normal images back from
those with synthetic anomalies (squared error and structural similarity); and a discriminative network, a
U-Net, that learns from both images which pixels are anomalous (focal loss). The heat map is what it says of a
pixel (softmax), and an image scores the maximum of the map's means over 21 x 21 pixels (of 256 px, in proportion for
other sizes; section 3.4). Half of the training images have an anomaly: a texture within a shape of Perlin noise
(section 3.3).

Paper: DRAEM: A Discriminatively Trained Reconstruction Embedding for Surface Anomaly Detection, ICCV 2021,
    arXiv:2108.07610; SSPCAB, CVPR 2022, arXiv:2111.09099.
Reference: https://github.com/VitjanZ/DRAEM; anomalib (where SSPCAB stands).
Differences: anomalies are drawn on the device; kernels are drawn as a ResNet's, and convolutions before a batch norm
    have no bias, which that takes away; upsampling is by pixel centers; textures are changed as in the reference, but
    brightness is one of a channel's levels, not of a color space; they are drawn from 1,000 at most; an epoch is one
    pass over the images, each once; the running variance is not corrected for the size of a batch.
Results: experiments/recipes/draem.py
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, UInt8

from jaxad.base import Batch, Frozen, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.nn import ConvNorm
from jaxad.nn.sspcab import Sspcab
from jaxad.nn.unet import Blocks, doubled, halved
from jaxad.ops.heatmap import neighborhood_mean
from jaxad.ops.image import pixels
from jaxad.ops.losses import focal_loss
from jaxad.ops.ssim import ssim
from jaxad.synthesis.anomaly import textured
from jaxad.synthesis.texture import BOLD_CHANGES, source
from jaxad.synthesis.warp import rotate
from jaxad.training.checks import above_zero, at_least_one, multiples_of
from jaxad.training.gradient import Trained, begin, descend_with, mean_of_valid, zero_padding

ROTATED, ANOMALOUS = 0.3, 0.5
"""Shares of the training images that are rotated, and that have an anomaly."""
DEGREES = 90.0
REACH = 10 / 256
"""Of the mean that scores an image, from its middle to its sides, as a share of the image's shorter side."""


class DraemTraining(NamedTuple):
    """Both networks while they are trained."""

    trained: Trained
    running: PyTree
    """Statistics of their batch norms."""


class DraemNetworks(NamedTuple):
    """The trained networks."""

    params: PyTree
    running: PyTree


class Reconstructive(nn.Module):
    """An encoder of five blocks and a decoder of four."""

    width: int
    sspcab: bool

    @nn.compact
    def __call__(
        self, image: Float[Array, "b h w 3"], valid: Bool[Array, "b"] | None
    ) -> tuple[Float[Array, "b h w 3"], Float[Array, "b"]]:
        """The image without anomalies, and the squared error of SSPCAB (0 without it)."""
        w, x = self.width, image
        for features in (w, 2 * w, 4 * w, 8 * w):
            x = halved(Blocks((features, features))(x, valid))
        error = jnp.zeros(len(image))
        if self.sspcab:
            predicted = Sspcab()(x)
            x, error = predicted, jnp.mean((predicted - x) ** 2, (1, 2, 3))
        else:
            x = Blocks((8 * w, 8 * w))(x, valid)
        for features, last in ((8 * w, 4 * w), (4 * w, 2 * w), (2 * w, w), (w, w)):
            x = Blocks((features, features, last))(doubled(x), valid)
        return nn.Conv(3, (3, 3))(x), error


class Discriminative(nn.Module):
    """A U-Net of six blocks, of the image and its reconstruction."""

    width: int

    @nn.compact
    def __call__(self, both: Float[Array, "b h w 6"], valid: Bool[Array, "b"] | None) -> Float[Array, "b h w 2"]:
        """Logits of being normal and of being anomalous."""
        w, x, links = self.width, both, []
        for features in (w, 2 * w, 4 * w, 8 * w, 8 * w):
            x = Blocks((features, features))(x, valid)
            links.append(x)
            x = halved(x)
        x = Blocks((8 * w, 8 * w))(x, valid)
        for features, link in zip((8 * w, 4 * w, 2 * w, w, w), links[::-1], strict=True):
            up = nn.relu(ConvNorm(features, 3)(doubled(x), valid=valid))
            x = Blocks((features, features))(jnp.concatenate([up, link], -1), valid)
        return nn.Conv(2, (3, 3))(x)


def draem(
    *,
    image_size: tuple[int, int] = (256, 256),
    reconstructive_width: int = 128,
    discriminative_width: int = 64,
    sspcab: bool = False,
    sspcab_weight: float = 0.1,
    epochs: int = 700,
    train_batch_size: int = 8,
    learning_rate: float = 1e-4,
) -> Method:
    """DRAEM.

    Args:
        image_size: (height, width) of the images, multiples of 32; that of the heat map.
        reconstructive_width: Channels of the reconstructive network's first block; deeper ones have up to 8 times more.
        discriminative_width: The same of the discriminative network.
        sspcab: A self-supervised predictive block stands in the middle of the reconstructive network.
        sspcab_weight: Of its squared error in the loss.
        epochs: Passes over the training images.
        train_batch_size: Images of a step.
        learning_rate: Of Adam; a fifth of it after 0.8 of the steps, and a fifth of that after 0.9.

    Raises:
        ValueError: A hyper-parameter is out of its range.
    """
    at_least_one(
        reconstructive_width=reconstructive_width,
        discriminative_width=discriminative_width,
        epochs=epochs,
        train_batch_size=train_batch_size,
    )
    above_zero(learning_rate=learning_rate, sspcab_weight=sspcab_weight)
    multiples_of(32, image_size=image_size)
    painter, finder = Reconstructive(reconstructive_width, sspcab), Discriminative(discriminative_width)
    optimizer = optax.adam(learning_rate)

    def apply(
        params: PyTree, running: PyTree, image: Float[Array, "b h w 3"], valid: Bool[Array, "b"] | None
    ) -> tuple[Array, Array, Array, PyTree]:
        """The reconstruction, the error of SSPCAB, the logits, and the new statistics."""
        new, mutable = {}, ["batch_stats"] if valid is not None else []

        def of(name: str, module: nn.Module, x: Array) -> Any:
            variables = {"params": params[name], "batch_stats": running[name]}
            found, changed = module.apply(variables, x, valid, mutable=mutable)
            new[name] = changed.get("batch_stats", running[name])
            return found

        painted, error = of("reconstructive", painter, image)
        logits = of("discriminative", finder, jnp.concatenate([painted, image], -1))
        return painted, error, logits, new

    def init(key: Key, frozen: Frozen, spec: PyTree) -> DraemTraining:
        del frozen, spec
        keys, one, valid = jax.random.split(key), jnp.zeros((1, *image_size, 3)), jnp.ones(1, bool)
        made = {
            "reconstructive": painter.init(keys[0], one, valid),
            "discriminative": finder.init(keys[1], jnp.concatenate([one, one], -1), valid),
        }
        params, running = ({name: part[kind] for name, part in made.items()} for kind in ("params", "batch_stats"))
        return DraemTraining(begin(optimizer, params), running)

    def spoiled(key: Key, image: Float[Array, "h w 3"], textures: Array | None) -> tuple[Array, Array, Array]:
        """A training image, the same with or without an anomaly, and the mask of that."""
        which, turn, texture, shape = jax.random.split(key, 4)
        rotated, anomalous = jax.random.bernoulli(which, jnp.asarray([ROTATED, ANOMALOUS]))
        degrees = jnp.where(rotated, jax.random.uniform(turn, minval=-DEGREES, maxval=DEGREES), 0)
        image = rotate(image, degrees)
        made, mask = textured(shape, image, source(texture, image_size, textures, BOLD_CHANGES))
        return image, jnp.where(anomalous, made, image), mask & anomalous

    def train(key: Key, state: DraemTraining, frozen: Frozen, batch: Batch) -> tuple[DraemTraining, Metrics]:
        given = zero_padding(batch.x, batch.valid).astype(jnp.float32) / 255
        textures = (frozen or {}).get("auxiliary")
        keys = jax.random.split(key, len(given))
        image, made, mask = jax.vmap(lambda key, image: spoiled(key, image, textures))(keys, given)

        def loss(params: PyTree) -> Any:
            painted, error, logits, new = apply(params, state.running, made, batch.valid)
            total = jnp.mean((painted - image) ** 2, (1, 2, 3)) + 1 - ssim(painted, image)
            total = total + focal_loss(jax.nn.softmax(logits)[..., 1], mask).mean((1, 2)) + sspcab_weight * error
            return mean_of_valid(total, batch.valid), new

        rate = jnp.where(batch.progress < 0.8, 1.0, jnp.where(batch.progress < 0.9, 0.2, 0.04))
        trained, metrics, running = descend_with(optimizer, state.trained, loss, rate)
        return DraemTraining(trained, running), metrics

    def finish(key: Key, state: DraemTraining, frozen: Frozen) -> DraemNetworks:
        del key, frozen
        return DraemNetworks(state.trained.params, state.running)

    def score(state: DraemNetworks, frozen: Frozen, x: UInt8[Array, "b h w 3"]) -> Scores:
        del frozen
        _, _, logits, _ = apply(state.params, state.running, x.astype(jnp.float32) / 255, None)
        pixel = jax.nn.softmax(logits)[..., 1]
        return Scores(neighborhood_mean(pixel[..., None], 2 * round(REACH * min(image_size)) + 1).max((1, 2, 3)), pixel)

    stage = Stage("train", train, finish, epochs=epochs, batch_size=train_batch_size, shuffle=True)
    return Method(pixels, init, (stage,), score, auxiliary="optional")
