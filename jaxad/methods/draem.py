"""DRAEM: one network paints synthetic anomalies out, another finds them in the image beside what was painted.

Stored: a reconstructive network, an encoder and decoder without skip connections, trained to restore normal images
from those with synthetic anomalies (squared error and structural similarity); and a discriminative network, a U-Net,
trained to tell from both images which pixels are anomalous (focal loss). The heat map is the U-Net's probability of an
anomaly (softmax), and an image scores the maximum of the map's means over 21 x 21 pixels (for 256 px, in proportion for
other sizes; section 3.4). Half of the training images have an anomaly: a texture within a shape of Perlin noise
(section 3.3).

Family: synthetic
Paper: DRAEM: A Discriminatively Trained Reconstruction Embedding for Surface Anomaly Detection, ICCV 2021,
    arXiv:2108.07610; SSPCAB, CVPR 2022, arXiv:2111.09099.
Reference: https://github.com/VitjanZ/DRAEM; anomalib (for the place of SSPCAB).
Differences: anomalies are drawn on the device; convolutions before a batch norm have no bias, which batch norm would
    cancel; textures are augmented as in the reference, but brightness changes per channel, not in a color space; at
    most 1,000 textures are used; an epoch is one pass over the images, not as many draws; running variances are biased
    (torch's are not, and are larger by 0.2 % at most, for 256 px); structural similarity is that of values in [0, 1],
    where the reference takes a wider range for a batch while a restored value is below -0.5 (in the first few steps,
    whose similarity loss is then 7 % lower).
Results: experiments/recipes/draem.py
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from jaxad.base import Auxiliary, Batch, Frozen, Ignored, Key, Method, PyTree, Scores
from jaxad.nn.initial import torch_bias
from jaxad.nn.sspcab import Sspcab
from jaxad.nn.unet import NORMAL, Blocks, halved, stretched
from jaxad.ops.heatmap import counted, neighborhood_mean
from jaxad.ops.image import pixels
from jaxad.ops.losses import focal_loss
from jaxad.ops.ssim import ssim
from jaxad.synthesis.anomaly import add_texture
from jaxad.synthesis.texture import BOLD_CHANGES, source
from jaxad.synthesis.warp import rotate
from jaxad.training import gradient_stage
from jaxad.training.checks import above_zero, at_least_one, multiples_of

ROTATED, ANOMALOUS = 0.3, 0.5
"""Shares of the training images that are rotated, and that get an anomaly."""
DEGREES = 90.0
"""Largest rotation, either way."""
REACH = 10 / 256
"""Half the side of the window whose mean scores an image, as a share of the image's shorter side."""


class DraemNetworks(NamedTuple):
    """Both networks, under `reconstructive` and `discriminative`."""

    params: PyTree
    stats: PyTree
    """Running statistics of their batch norms."""


class Reconstructive(nn.Module):
    """An encoder of five blocks and a decoder of four."""

    width: int
    sspcab: bool

    @nn.compact
    def __call__(
        self, image: Float[Array, "b h w 3"], *, train: bool
    ) -> tuple[Float[Array, "b h w 3"], Float[Array, "b"]]:
        """The image without anomalies, and the squared error of SSPCAB (0 without it)."""
        w, x = self.width, image
        for features in (w, 2 * w, 4 * w, 8 * w):
            x = halved(Blocks((features, features))(x, train=train))
        error = jnp.zeros(len(image))
        if self.sspcab:
            predicted = Sspcab()(x)
            x, error = predicted, jnp.mean((predicted - x) ** 2, (1, 2, 3))
        else:
            x = Blocks((8 * w, 8 * w))(x, train=train)
        for features, last in ((8 * w, 4 * w), (4 * w, 2 * w), (2 * w, w), (w, w)):
            x = Blocks((features, features, last))(stretched(x), train=train)
        return nn.Conv(3, (3, 3), kernel_init=NORMAL, bias_init=torch_bias(9 * w))(x), error


class Discriminative(nn.Module):
    """A U-Net of six blocks; its input is the restored image and the image, concatenated."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 6"], *, train: bool) -> Float[Array, "b h w 2"]:
        """Logits of being normal and of being anomalous."""
        w, skips = self.width, []
        for features in (w, 2 * w, 4 * w, 8 * w, 8 * w):
            x = Blocks((features, features))(x, train=train)
            skips.append(x)
            x = halved(x)
        x = Blocks((8 * w, 8 * w))(x, train=train)
        for features, skip in zip((8 * w, 4 * w, 2 * w, w, w), skips[::-1], strict=True):
            up = Blocks((features,))(stretched(x), train=train)
            x = Blocks((features, features))(jnp.concatenate([up, skip], -1), train=train)
        return nn.Conv(2, (3, 3), kernel_init=NORMAL, bias_init=torch_bias(9 * w))(x)


def step_decay(progress: Float[Array, ""]) -> Float[Array, ""]:
    """The schedule of a rate that falls to a fifth after 0.8 of the steps, and to a fifth of that after 0.9."""
    return jnp.where(progress < 0.8, 1.0, jnp.where(progress < 0.9, 0.2, 0.04))


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
    """DRAEM; its textures are auxiliary photographs, or procedural ones where there are none.

    Args:
        image_size: (height, width) of the images and of the heat map, multiples of 32.
        reconstructive_width: Channels of the reconstructive network's first block; deeper ones have up to 8 times more.
        discriminative_width: The same for the discriminative network.
        sspcab: Put a self-supervised predictive block in the middle of the reconstructive network.
        sspcab_weight: Weight of its squared error in the loss.
        epochs: Passes over the training images.
        train_batch_size: Images per step.
        learning_rate: Of Adam; a fifth of it after 0.8 of the steps, and a fifth of that after 0.9.

    Raises:
        ValueError: A hyperparameter is out of range.
    """
    at_least_one(
        reconstructive_width=reconstructive_width,
        discriminative_width=discriminative_width,
        epochs=epochs,
        train_batch_size=train_batch_size,
    )
    above_zero(learning_rate=learning_rate, sspcab_weight=sspcab_weight)
    multiples_of(32, image_size=image_size)
    reconstructive, discriminative = Reconstructive(reconstructive_width, sspcab), Discriminative(discriminative_width)

    def apply(params: PyTree, stats: PyTree, image: Float[Array, "b h w 3"], train: bool) -> Any:
        """The restored image, the error of SSPCAB, the logits, and the new statistics."""
        changes = {}

        def run(name: str, module: nn.Module, x: Array) -> Any:
            variables = {"params": params[name], "batch_stats": stats[name]}
            output, mutated = module.apply(variables, x, train=train, mutable=["batch_stats"])
            changes[name] = mutated["batch_stats"]
            return output

        restored, error = run("reconstructive", reconstructive, image)
        logits = run("discriminative", discriminative, jnp.concatenate([restored, image], -1))
        return restored, error, logits, changes

    def init(key: Key, state: None, frozen: Frozen, spec: PyTree) -> DraemNetworks:
        del state, frozen, spec
        keys = jax.random.split(key)
        variables = {
            "reconstructive": reconstructive.init(keys[0], jnp.zeros((1, *image_size, 3)), train=True),
            "discriminative": discriminative.init(keys[1], jnp.zeros((1, *image_size, 6)), train=True),
        }
        return DraemNetworks(*({name: v[kind] for name, v in variables.items()} for kind in ("params", "batch_stats")))

    def synthesize(key: Key, image: Float[Array, "h w 3"], textures: Array | None) -> tuple[Array, Array, Array]:
        """A training image, the same with or without an anomaly, and the mask of the anomaly."""
        which, turn, texture, shape = jax.random.split(key, 4)
        rotated, anomalous = jax.random.bernoulli(which, jnp.asarray([ROTATED, ANOMALOUS]))
        degrees = jnp.where(rotated, jax.random.uniform(turn, minval=-DEGREES, maxval=DEGREES), 0)
        image = rotate(image, degrees)
        defective, mask = add_texture(shape, image, source(texture, image_size, textures, BOLD_CHANGES))
        return image, jnp.where(anomalous, defective, image), mask & anomalous

    def loss(params: PyTree, model: DraemNetworks, key: Key, frozen: Frozen, batch: Batch) -> tuple[Array, dict]:
        del frozen
        keys, images = jax.random.split(key, len(batch.x)), batch.x.astype(jnp.float32) / 255
        image, input_image, mask = jax.vmap(synthesize, (0, 0, None))(keys, images, batch.auxiliary)
        restored, error, logits, stats = apply(params, model.stats, input_image, train=True)
        value = jnp.mean((restored - image) ** 2) + 1 - ssim(restored, image).mean()
        value = value + focal_loss(jax.nn.softmax(logits)[..., 1], mask).mean() + sspcab_weight * error.mean()
        return value, {"stats": stats}

    def score(state: DraemNetworks, frozen: Frozen, x: UInt8[Array, "b h w 3"], ignore: Ignored = None) -> Scores:
        del frozen
        _, _, logits, _ = apply(state.params, state.stats, x.astype(jnp.float32) / 255, train=False)
        pixel = jax.nn.softmax(logits)[..., 1]
        means = neighborhood_mean(pixel[..., None], 2 * round(REACH * min(image_size)) + 1)[..., 0]
        return Scores(counted(means, ignore).max((1, 2)), pixel)

    optimizer = optax.adam(learning_rate)
    stage = gradient_stage(
        "train", init, loss, optimizer, epochs=epochs, batch_size=train_batch_size, schedule=step_decay
    )
    return Method(pixels, (stage,), score, auxiliary=Auxiliary(), pretrained=False)
