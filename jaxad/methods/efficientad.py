"""EfficientAD: a student learns a small teacher and an autoencoder on normal images; both errors make the heat map.

Stored: the mean and deviation of the teacher's channels; a student of the teacher's architecture with twice its
channels, whose first half learns the teacher where its error is largest (hard feature loss, section 3.2) and is trained
to be zero on photographs of other things (penalty); an autoencoder that learns the teacher's map of a whole image, and
that the student's second half learns (section 3.3). Both maps of squared errors are scaled so that the 0.9 and the
0.995 quantile of held-out normal images become 0 and 0.1 (section 3.4). A position scores their mean, and an image its
maximum.

Family: distillation
Paper: EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level Latencies, WACV 2024, arXiv:2303.14535.
Reference: https://github.com/nelson1425/EfficientAD (no official code); anomalib.
Differences: the teacher may be `pdn_small`, which has stride 8 and pads: teacher and student then see images continued
    by their mirror image, and drop the border of their maps, so that they describe as much of an image as the published
    networks do; its channels, principal components of its own teacher's, are rotated first (`rotation`). The decoder of
    the autoencoder stops at twice the teacher's grid, which is the published one for the published networks, and its
    sizes follow the image's; every tenth training image is held out for the quantiles, not a random tenth; training is
    counted in epochs (70,000 steps on MVTec's classes of about 240 images); photographs are drawn from 1,000 at most;
    in a step of several images each has a quantile of its own. As in the first reference, quantiles are those of the
    maps before upsampling, and the border that the teacher does not describe scores 0 (anomalib scales maps that are
    upsampled and padded); the heat map has the size of the network's input. As in anomalib, jittered images are not
    cut to 256 levels again (the autoencoder's loss then differs by 1 % at most).
Results: experiments/recipes/efficientad.py
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from jaxad.backbones import Backbone, features, normalize, stride, student
from jaxad.backbones import backbone as architecture
from jaxad.base import Auxiliary, Batch, EmbedFn, Frozen, Ignored, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.nn.initial import torch_bias, torch_uniform
from jaxad.ops.collect import collect
from jaxad.ops.gaussian import Moments, channels, channels_update, moments_init
from jaxad.ops.heatmap import counted, upsample_blur
from jaxad.ops.image import levels
from jaxad.synthesis.color import gray_of, scale_difference
from jaxad.training import gradient_stage
from jaxad.training.checks import above_zero, at_least_one, multiples_of, zero_or_more
from jaxad.training.holdout import HOLDOUT_STEP, holdout_rows, training_rows
from jaxad.training.optimizers import torch_adam

LOW, HIGH = 0.9, 0.995
"""Quantiles of the errors of normal images that become 0 and 0.1."""
MIRRORED, BORDER = 16, 4
"""For a teacher that pads: pixels by which images are continued, and positions at the border of its map that padding
reaches. What is left covers all but 16 px at the border, as with the published networks."""


class EfficientadNetworks(NamedTuple):
    """Student and autoencoder, and the teacher's channels."""

    params: PyTree
    mean: Float[Array, "c"]
    deviation: Float[Array, "c"]


class EfficientadErrors(NamedTuple):
    """The trained networks, and the errors of held-out images so far."""

    params: PyTree
    mean: Float[Array, "c"]
    deviation: Float[Array, "c"]
    errors: Float[Array, "n h w 2"]
    """NaN where there is no image."""


class EfficientadStudent(NamedTuple):
    """The trained networks, and the quantiles that scale both errors."""

    params: PyTree
    mean: Float[Array, "c"]
    deviation: Float[Array, "c"]
    low: Float[Array, "2"]
    high: Float[Array, "2"]


class Autoencoder(nn.Module):
    """Compresses an image to a vector, and decodes that to a map like the teacher's."""

    grid: tuple[int, int]
    channels: int
    stride: int
    """Of the grid, in pixels."""

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"], dropout: Key | None) -> Float[Array, "b gh gw c"]:
        """The map of a normalized image; `dropout` is the key of dropout in training, None without."""
        size = image.shape[1:3]

        def conv(x: Array, features: int, kernel: tuple[int, int], stride: int = 1, pad: int = 1) -> Array:
            bias = torch_bias(math.prod(kernel) * x.shape[-1])
            # The padding is explicit: with padding inside the convolution its kernel's gradient is slow on a CPU.
            x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
            return nn.Conv(features, kernel, stride, "VALID", kernel_init=torch_uniform, bias_init=bias)(x)

        def resize(x: Array, to: tuple[int, int]) -> Array:
            return jax.image.resize(x, (x.shape[0], *to, x.shape[-1]), "linear", antialias=False)

        x = image
        for width in (32, 32, 64, 64, 64):
            x = nn.relu(conv(x, width, (4, 4), 2))
        x = conv(x, 64, (x.shape[1], x.shape[2]), pad=0)
        keys = iter(() if dropout is None else jax.random.split(dropout, 6))
        for divisor, less in ((64, 1), (32, 0), (16, 1), (8, 0), (4, 1), (2, 1)):
            if divisor >= self.stride // 2:
                x = resize(x, (max(1, size[0] // divisor - less), max(1, size[1] // divisor - less)))
                x = nn.relu(conv(x, 64, (4, 4), pad=2))
                if dropout is not None:
                    x = nn.Dropout(0.2, deterministic=False)(x, rng=next(keys))
        x = nn.relu(conv(resize(x, self.grid), 64, (3, 3)))
        return conv(x, self.channels, (3, 3))


def jitter(key: Key, image: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Changes brightness, contrast or saturation of images in [0, 1] by a factor of 0.8 to 1.2."""
    kind_key, factor_key = jax.random.split(key)
    gray = gray_of(image)
    kind = jax.random.randint(kind_key, (len(image), 1, 1, 1), 0, 3)
    base = jnp.where(kind == 0, 0.0, jnp.where(kind == 1, gray.mean((1, 2), keepdims=True), gray))
    factor = jax.random.uniform(factor_key, (len(image), 1, 1, 1), minval=0.8, maxval=1.2)
    return scale_difference(base, image, factor)


def draw_photographs(key: Key, photographs: Array, n: int) -> Float[Array, "n h w 3"]:
    """Random photographs in [0, 1], three out of ten in gray (section 3.2)."""
    index_key, gray_key = jax.random.split(key)
    image = photographs[jax.random.randint(index_key, (n,), 0, len(photographs))].astype(jnp.float32) / 255
    return jnp.where(jax.random.uniform(gray_key, (n, 1, 1, 1)) < 0.3, gray_of(image), image)


def hard_mean(errors: Float[Array, "b h w c"], quantile: float) -> Float[Array, "b"]:
    """The mean of the errors of each image that are at or above their quantile (Eq. 1)."""
    flat = errors.reshape(len(errors), -1)
    n = flat.shape[1]
    return jax.lax.top_k(flat, n - math.ceil(quantile * (n - 1)))[0].mean(-1)


def with_mirrored_border(network: Backbone, image: Array) -> Array:
    """The image as teacher and student see it: continued by its mirror image if the network pads."""
    margin = MIRRORED if network.pads else 0
    return jnp.pad(image, ((0, 0), (margin, margin), (margin, margin), (0, 0)), "symmetric")


def without_border(network: Backbone, maps: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """The part of the map of a continued image that padding does not reach."""
    margin = BORDER if network.pads else 0
    return maps[:, margin : maps.shape[1] - margin, margin : maps.shape[2] - margin]


@functools.lru_cache
def teacher_features(network: Backbone, layer: str) -> EmbedFn:
    """The `embed`: the image, and the teacher's map of it, with rotated channels if the teacher pads."""
    teacher = features(network, (layer,))

    def embed(frozen: Frozen, image: Array) -> dict[str, Array]:
        maps = without_border(network, teacher(frozen, with_mirrored_border(network, image))[layer])
        if network.pads:
            maps = jnp.matmul(maps, rotation(maps.shape[-1]), precision="highest")
        return {"image": levels(image), layer: maps}

    return embed


def rotation(c: int) -> Float[np.ndarray, "c c"]:
    """A fixed random rotation that turns principal components into channels of similar variance.

    It keeps squared distances. Without it, standardized channels would have the noise of the last components as large
    as the first components.
    """
    return np.linalg.qr(np.random.default_rng(0).standard_normal((c, c)))[0].astype(np.float32)


def efficientad(
    *,
    backbone: str | Backbone = "efficientad_small",
    image_size: tuple[int, int] = (256, 256),
    penalty: bool = True,
    hard_quantile: float = 0.999,
    epochs: int = 325,
    train_batch_size: int = 1,
    learning_rate: float = 1e-4,
    weight_decay: float = 1e-5,
) -> Method:
    """EfficientAD.

    Args:
        backbone: The teacher, a patch-description network: `efficientad_small` (EfficientAD-S), `efficientad_medium`
            (M) or `pdn_small`.
        image_size: (height, width) of the images and of the heat map, multiples of 32 and 64 or more.
        penalty: The student learns to be zero on photographs of other things, which are then needed (`auxiliary`).
        hard_quantile: Share of the teacher's values that the loss ignores, those with the smallest errors.
        epochs: Passes over the training images.
        train_batch_size: Images per step.
        learning_rate: Of Adam; a tenth of it in the last twentieth of the steps.
        weight_decay: Of Adam, added to the gradient.

    Raises:
        ValueError: A hyperparameter is out of range, or the backbone is no patch-description network.
    """
    at_least_one(epochs=epochs, train_batch_size=train_batch_size)
    above_zero(learning_rate=learning_rate)
    zero_or_more(weight_decay=weight_decay)
    if not 0 <= hard_quantile < 1:
        raise ValueError(f"hard_quantile must be in [0, 1), got {hard_quantile}")
    multiples_of(32, image_size=image_size)
    if min(image_size) < 64:
        raise ValueError(f"image_size must be 64 or more to have patches, got {image_size}")
    network = architecture(backbone)
    layer = network.stages[-1]
    learner, step = student(network, (layer,), copies=2), stride(network, layer)
    embed = teacher_features(network, layer)

    def init_moments(key: Key, state: None, frozen: Frozen, spec: PyTree) -> Moments:
        del key, state, frozen
        return moments_init((spec[layer].shape[-1], 1))

    def measure(key: Key, state: Moments, frozen: Frozen, batch: Batch) -> tuple[Moments, Metrics]:
        del key, frozen
        return channels_update(state, batch.x[layer], batch.valid), {}

    def mean_and_deviation(key: Key, state: Moments, frozen: Frozen) -> tuple[Array, Array]:
        del key, frozen
        return channels(state)

    def autoencoder(x: PyTree) -> Autoencoder:
        _, h, w, c = x[layer].shape
        return Autoencoder((h, w), c, step)

    def init(key: Key, state: tuple[Array, Array], frozen: Frozen, spec: PyTree) -> EfficientadNetworks:
        del frozen
        student_key, autoencoder_key = jax.random.split(key)
        params = {
            "student": learner.init(student_key)[0],
            "autoencoder": autoencoder(spec).init(autoencoder_key, jnp.zeros((1, *image_size, 3)), None)["params"],
        }
        return EfficientadNetworks(params, *state)

    def student_map(params: PyTree, frozen: Frozen, image: Array) -> Float[Array, "b h w c2"]:
        """Both halves of the student's channels."""
        maps, _ = learner.apply(params["student"], {}, frozen, with_mirrored_border(network, image), train=False)
        return without_border(network, maps[layer])

    def decoded(
        params: PyTree, frozen: Frozen, x: PyTree, image: Array, dropout: Key | None = None
    ) -> Float[Array, "b h w c"]:
        """The autoencoder's map; x gives its shape."""
        image = normalize(frozen, image, jnp.float32)
        maps: Any = autoencoder(x).apply({"params": params["autoencoder"]}, image, dropout)
        return maps

    def standardized(model: Any, x: PyTree) -> Float[Array, "b h w c"]:
        """The teacher's map."""
        return (x[layer] - model.mean) / model.deviation

    def loss(params: PyTree, model: EfficientadNetworks, key: Key, frozen: Frozen, batch: Batch) -> tuple[Array, dict]:
        jitter_key, photograph_key, dropout_key = jax.random.split(key, 3)
        image = batch.x["image"].astype(jnp.float32) / 255
        jittered = jitter(jitter_key, image)
        images = [image, jittered]
        if penalty:
            photographs: Any = batch.auxiliary  # never None: the driver asks for them
            images.append(draw_photographs(photograph_key, photographs, len(image)))
        outputs = jnp.split(student_map(params, frozen, jnp.concatenate(images)), len(images))
        teacher, teacher_of_jittered = (standardized(model, x) for x in (batch.x, embed(frozen, jittered)))
        reconstruction = decoded(params, frozen, batch.x, jittered, dropout_key)
        c = teacher.shape[-1]
        value = hard_mean((teacher - outputs[0][..., :c]) ** 2, hard_quantile).mean()
        value += jnp.mean((teacher_of_jittered - reconstruction) ** 2 + (reconstruction - outputs[1][..., c:]) ** 2)
        if penalty:
            value += jnp.mean(outputs[2][..., :c] ** 2)
        return value, {}

    def errors(model: Any, frozen: Frozen, x: dict[str, Array]) -> Float[Array, "b h w 2"]:
        """The squared errors of the student against the teacher, and against the autoencoder."""
        teacher, c = standardized(model, x), x[layer].shape[-1]
        output = student_map(model.params, frozen, x["image"])
        reconstruction = decoded(model.params, frozen, x, x["image"])
        pairs = (teacher, output[..., :c]), (reconstruction, output[..., c:])
        return jnp.stack([((target - values) ** 2).mean(-1) for target, values in pairs], -1)

    def init_errors(key: Key, state: EfficientadNetworks, frozen: Frozen, spec: PyTree) -> EfficientadErrors:
        del key, frozen
        n, h, w, _ = spec[layer].shape
        return EfficientadErrors(*state, jnp.full((len(holdout_rows(n)), h, w, 2), jnp.nan, jnp.float32))

    def calibrate(
        key: Key, state: EfficientadErrors, frozen: Frozen, batch: Batch
    ) -> tuple[EfficientadErrors, Metrics]:
        del key
        row = batch._replace(index=batch.index // HOLDOUT_STEP)
        return state._replace(errors=collect(state.errors, errors(state, frozen, batch.x), row)), {}

    def quantiles(key: Key, state: EfficientadErrors, frozen: Frozen) -> EfficientadStudent:
        del key, frozen
        low, high = jnp.nanquantile(state.errors, jnp.asarray([LOW, HIGH]), (0, 1, 2))
        return EfficientadStudent(state.params, state.mean, state.deviation, low, high)

    def score(state: EfficientadStudent, frozen: Frozen, x: dict[str, Array], ignore: Ignored = None) -> Scores:
        scaled = (0.1 * (errors(state, frozen, x) - state.low) / (state.high - state.low)).mean(-1)
        pads = [((size // step - grid) // 2,) * 2 for size, grid in zip(image_size, scaled.shape[1:], strict=True)]
        pixel = upsample_blur(jnp.pad(scaled, ((0, 0), *pads)), image_size, 0.0)
        return Scores(counted(pixel, ignore).max((1, 2)), pixel)

    stages = (
        Stage("measure", init_moments, measure, mean_and_deviation, rows=training_rows),
        gradient_stage(
            "train",
            init,
            loss,
            torch_adam(learning_rate, weight_decay),
            epochs=epochs,
            batch_size=train_batch_size,
            schedule=lambda progress: jnp.where(progress < 0.95, 1.0, 0.1),
            rows=training_rows,
        ),
        Stage("calibrate", init_errors, calibrate, quantiles, rows=holdout_rows),
    )
    auxiliary = Auxiliary(needed=True, inner_half=True) if penalty else None
    return Method(embed, stages, score, auxiliary=auxiliary)
