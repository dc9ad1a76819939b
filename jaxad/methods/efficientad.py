"""EfficientAD: a student learns a small teacher, and an autoencoder, on normal images; both errors draw the heat map.

Stored: the mean and deviation of the teacher's channels; a student of the teacher's architecture with twice its
channels, whose first half learns the teacher where it is worst (hard feature loss, section 3.2) and is kept from it on
photographs of other things (penalty); an autoencoder, which learns the teacher from a whole image and is learned by the
student's second half (section 3.3). Both maps of squared errors are scaled so that the 0.9 and the 0.995 quantile of
held-out normal images become 0 and 0.1 (section 3.4); a position scores their mean, an image its maximum.

Paper: EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level Latencies, WACV 2024, arXiv:2303.14535.
Reference: https://github.com/nelson1425/EfficientAD (no official code); anomalib.
Differences: the teacher may be `pdn_small`, which has stride 8 and pads: it and its student see images continued by
    their mirror images, and describe as much of them as the published networks do (`AROUND`); its channels, principal
    components of its own teacher's, are mixed first (`mixing`). The decoder of the autoencoder stops at twice the
    teacher's grid, which for the published networks is the published one, and its sizes follow the image's; every tenth
    training image is held out for the quantiles, not a random tenth; steps are counted in epochs (70,000 of them on
    MVTec's classes of about 240 images); photographs are drawn from 1,000 at most. As in the reference, what the
    teacher does not describe at the border scores 0, and the heat map has the size that the network sees.
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

from jaxad.backbones import backbone as architecture
from jaxad.backbones import features, normalize, stride, student
from jaxad.base import Batch, EmbedFn, Frozen, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.nn.initial import torch_bias, torch_uniform
from jaxad.ops.gaussian import Moments, channels, channels_update, moments_init
from jaxad.ops.heatmap import upsample_blur
from jaxad.ops.image import levels
from jaxad.synthesis.color import apart_from, gray_of
from jaxad.training.checks import above_zero, at_least_one, multiples_of, zero_or_more
from jaxad.training.gradient import Trained, begin, descend, mean_of_valid, torch_adam, zero_padding
from jaxad.training.holdout import ONE_OF, held_out, learned_from

LOW, HIGH = 0.9, 0.995
"""Quantiles of the maps of normal images that become 0 and 0.1."""
AROUND, CUT = {"pdn_small": 16}, {"pdn_small": 4}
"""By teacher that pads: pixels by which images are continued, and positions at the border of its map that padding has
reached and which are dropped. What is left is all but 16 px at the border, as of the published networks."""


class EfficientadMeasuring(NamedTuple):
    """The untrained networks, and what the teacher gives for normal images so far."""

    params: PyTree
    moments: Moments
    maps: Float[Array, "n h w 2"]


class EfficientadTraining(NamedTuple):
    """Student and autoencoder while they are trained."""

    trained: Trained
    mean: Float[Array, "c"]
    deviation: Float[Array, "c"]
    maps: Float[Array, "n h w 2"]


class EfficientadCalibrating(NamedTuple):
    """The trained networks, and the maps of held-out images so far."""

    params: PyTree
    mean: Float[Array, "c"]
    deviation: Float[Array, "c"]
    maps: Float[Array, "n h w 2"]
    """NaN where there is no image."""


class EfficientadStudent(NamedTuple):
    """The trained networks, and where the scales of both maps begin and end."""

    params: PyTree
    mean: Float[Array, "c"]
    deviation: Float[Array, "c"]
    low: Float[Array, "2"]
    high: Float[Array, "2"]


class Autoencoder(nn.Module):
    """From an image to a map like the teacher's, through a vector."""

    grid: tuple[int, int]
    out: int
    stride: int
    """Of the grid, in pixels."""

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"], dropout: Key | None) -> Float[Array, "b gh gw c"]:
        """The map of a normalized image; the key draws what is left out while training."""
        size = image.shape[1:3]

        def conv(x: Array, features: int, kernel: tuple[int, int], stride: int = 1, pad: int = 1) -> Array:
            bias = torch_bias(math.prod(kernel) * x.shape[-1])
            # Padded first: where the map grows, the gradient of the kernel of a convolution that pads is slow on a CPU.
            x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
            return nn.Conv(features, kernel, stride, "VALID", kernel_init=torch_uniform, bias_init=bias)(x)

        def resized(x: Array, to: tuple[int, int]) -> Array:
            return jax.image.resize(x, (x.shape[0], *to, x.shape[-1]), "linear", antialias=False)

        x = image
        for width in (32, 32, 64, 64, 64):
            x = nn.relu(conv(x, width, (4, 4), 2))
        x = conv(x, 64, (x.shape[1], x.shape[2]), pad=0)
        keys = iter(() if dropout is None else jax.random.split(dropout, 6))
        for divisor, less in ((64, 1), (32, 0), (16, 1), (8, 0), (4, 1), (2, 1)):
            if divisor >= self.stride // 2:
                x = resized(x, (max(1, size[0] // divisor - less), max(1, size[1] // divisor - less)))
                x = nn.relu(conv(x, 64, (4, 4), pad=2))
                if dropout is not None:
                    x = nn.Dropout(0.2, deterministic=False)(x, rng=next(keys))
        x = nn.relu(conv(resized(x, self.grid), 64, (3, 3)))
        return conv(x, self.out, (3, 3))


def jitter(key: Key, image: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Images in [0, 1] with another brightness, contrast or saturation, by a factor of 0.8 to 1.2."""
    which, by = jax.random.split(key)
    gray = gray_of(image)
    kind = jax.random.randint(which, (len(image), 1, 1, 1), 0, 3)
    base = jnp.where(kind == 0, 0.0, jnp.where(kind == 1, gray.mean((1, 2), keepdims=True), gray))
    factor = jax.random.uniform(by, (len(image), 1, 1, 1), minval=0.8, maxval=1.2)
    return apart_from(base, image, factor)


def draw_photographs(key: Key, photographs: Array, n: int) -> Float[Array, "n h w 3"]:
    """Some photographs, in [0, 1], three of ten in gray (section 3.2)."""
    which, how = jax.random.split(key)
    image = photographs[jax.random.randint(which, (n,), 0, len(photographs))].astype(jnp.float32) / 255
    return jnp.where(jax.random.uniform(how, (n, 1, 1, 1)) < 0.3, gray_of(image), image)


def hard_mean(errors: Float[Array, "b h w c"], share: float) -> Float[Array, "b"]:
    """The mean of the errors of each image that are at or above their quantile of that share (Eq. 1)."""
    flat = errors.reshape(len(errors), -1)
    n = flat.shape[1]
    return jax.lax.top_k(flat, n - math.ceil(share * (n - 1)))[0].mean(-1)


def continued(backbone: str, image: Array) -> Array:
    """The image as teacher and student see it; for a teacher that pads it goes on as its mirror image."""
    margin = AROUND.get(backbone, 0)
    return jnp.pad(image, ((0, 0), (margin, margin), (margin, margin), (0, 0)), "symmetric")


def inside(backbone: str, maps: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Of the map of a continued image, what padding has not reached."""
    margin = CUT.get(backbone, 0)
    return maps[:, margin : maps.shape[1] - margin, margin : maps.shape[2] - margin]


@functools.lru_cache
def described(backbone: str, layer: str) -> EmbedFn:
    """The `embed`: the image, and what the teacher makes of it, in channels that can be scaled on their own."""
    teacher = features(backbone, (layer,))

    def embed(frozen: Frozen, image: Array) -> dict[str, Array]:
        found = inside(backbone, teacher(frozen, continued(backbone, image))[layer])
        if backbone == "pdn_small":
            found = jnp.matmul(found, mixing(found.shape[-1]), precision="highest")
        return {"image": levels(image), layer: found}

    return embed


def mixing(c: int) -> Float[np.ndarray, "c c"]:
    """A rotation, the same every time, that makes of principal components channels of about the same variance.

    Squared distances stay what they are. Scaling every component to the same variance would make noise of the last ones
    as large as the first ones.
    """
    return np.linalg.qr(np.random.default_rng(0).standard_normal((c, c)))[0].astype(np.float32)


def efficientad(
    *,
    backbone: str = "efficientad_small",
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
        image_size: (height, width) of the images, multiples of 32 and 64 or more; that of the heat map.
        penalty: The student learns to fail on photographs of other things, which must be given as auxiliary images.
        hard_quantile: Share of a teacher's values that teach nothing, those where the student errs least.
        epochs: Passes over the training images.
        train_batch_size: Images of a step.
        learning_rate: Of Adam, a tenth of it in the last twentieth of the steps.
        weight_decay: Of Adam, added to the gradient.

    Raises:
        ValueError: A hyper-parameter is out of its range, or the backbone describes no patches.
    """
    at_least_one(epochs=epochs, train_batch_size=train_batch_size)
    above_zero(learning_rate=learning_rate)
    zero_or_more(weight_decay=weight_decay)
    if not 0 <= hard_quantile < 1:
        raise ValueError(f"hard_quantile must be in [0, 1), got {hard_quantile}")
    multiples_of(32, image_size=image_size)
    if min(image_size) < 64:
        raise ValueError(f"image_size must be 64 or more, for patches to describe, got {image_size}")
    network = architecture(backbone)
    layer = network.stages[-1]
    learner, apart = student(backbone, (layer,), copies=2), stride(network, layer)
    optimizer = torch_adam(learning_rate, weight_decay)
    embed = described(backbone, layer)

    def learned(students: PyTree, frozen: Frozen, image: Array, valid: Any) -> Float[Array, "b h w c2"]:
        """Both halves of the student's map."""
        return inside(backbone, learner.apply(students, frozen, continued(backbone, image), valid)[0][layer])

    def decoder(x: PyTree) -> Autoencoder:
        _, h, w, c = x[layer].shape
        return Autoencoder((h, w), c, apart)

    def init(key: Key, frozen: Frozen, spec: PyTree) -> EfficientadMeasuring:
        del frozen
        first, second = jax.random.split(key)
        image = jnp.zeros((1, *image_size, 3))
        params = {"student": learner.init(first), "autoencoder": decoder(spec).init(second, image, None)}
        n, h, w, c = spec[layer].shape
        maps = jnp.full((-(-n // ONE_OF), h, w, 2), jnp.nan, jnp.float32)
        return EfficientadMeasuring(params, moments_init((c, 1)), maps)

    def measure(key: Key, state: EfficientadMeasuring, frozen: Frozen, batch: Batch) -> tuple[Any, Metrics]:
        del key, frozen
        return state._replace(moments=channels_update(state.moments, batch.x[layer], batch.valid)), {}

    def standardize(key: Key, state: EfficientadMeasuring, frozen: Frozen) -> EfficientadTraining:
        del key, frozen
        return EfficientadTraining(begin(optimizer, state.params), *channels(state.moments), state.maps)

    def standard(state: Any, x: dict[str, Array]) -> Float[Array, "b h w c"]:
        return (x[layer] - state.mean) / state.deviation

    def train(key: Key, state: EfficientadTraining, frozen: Frozen, batch: Batch) -> tuple[Any, Metrics]:
        keys = jax.random.split(key, 3)
        x = zero_padding(batch.x, batch.valid)
        image = x["image"].astype(jnp.float32) / 255
        n, c = len(image), x[layer].shape[-1]
        seen = [image, jitter(keys[0], image)]
        if penalty:
            if "auxiliary" not in frozen:
                raise ValueError("penalty needs photographs of other things: give auxiliary, or set penalty to False")
            seen.append(draw_photographs(keys[1], frozen["auxiliary"], n))
        own, other = (standard(state, maps) for maps in (x, embed(frozen, seen[1])))

        def loss(params: PyTree) -> Float[Array, ""]:
            parts = jnp.split(learned(params["student"], frozen, jnp.concatenate(seen), batch.valid), len(seen))
            decoded: Any = decoder(x).apply(params["autoencoder"], normalize(frozen, seen[1], jnp.float32), keys[2])
            found = hard_mean((own - parts[0][..., :c]) ** 2, hard_quantile)
            found = found + jnp.mean((other - decoded) ** 2 + (decoded - parts[1][..., c:]) ** 2, (1, 2, 3))
            if penalty:
                found = found + jnp.mean(parts[2][..., :c] ** 2, (1, 2, 3))
            return mean_of_valid(found, batch.valid)

        rate = jnp.where(batch.progress < 0.95, 1.0, 0.1)
        trained, metrics = descend(optimizer, state.trained, loss, rate)
        return state._replace(trained=trained), metrics

    def to_calibrate(key: Key, state: EfficientadTraining, frozen: Frozen) -> EfficientadCalibrating:
        del key, frozen
        return EfficientadCalibrating(state.trained.params, state.mean, state.deviation, state.maps)

    def errors(state: Any, frozen: Frozen, x: dict[str, Array]) -> Float[Array, "b h w 2"]:
        """The student's map and that of student and autoencoder."""
        own, c = standard(state, x), x[layer].shape[-1]
        found = learned(state.params["student"], frozen, x["image"], None)
        image = normalize(frozen, x["image"], jnp.float32)
        decoded: Any = decoder(x).apply(state.params["autoencoder"], image, None)
        return jnp.stack([((own - found[..., :c]) ** 2).mean(-1), ((decoded - found[..., c:]) ** 2).mean(-1)], -1)

    def calibrate(key: Key, state: EfficientadCalibrating, frozen: Frozen, batch: Batch) -> tuple[Any, Metrics]:
        del key
        row = jnp.where(batch.valid, batch.index // ONE_OF, state.maps.shape[0])
        return state._replace(maps=state.maps.at[row].set(errors(state, frozen, batch.x), mode="drop")), {}

    def finish(key: Key, state: EfficientadCalibrating, frozen: Frozen) -> EfficientadStudent:
        del key, frozen
        low, high = jnp.nanquantile(state.maps, jnp.asarray([LOW, HIGH]), (0, 1, 2))
        return EfficientadStudent(state.params, state.mean, state.deviation, low, high)

    def score(state: EfficientadStudent, frozen: Frozen, x: dict[str, Array]) -> Scores:
        found = (0.1 * (errors(state, frozen, x) - state.low) / (state.high - state.low)).mean(-1)
        pads = [((size // apart - grid) // 2,) * 2 for size, grid in zip(image_size, found.shape[1:], strict=True)]
        pixel = upsample_blur(jnp.pad(found, ((0, 0), *pads)), image_size, 0.0)
        return Scores(pixel.max((1, 2)), pixel)

    stages = (
        Stage("measure", measure, standardize, rows=learned_from),
        Stage(
            "train", train, to_calibrate, epochs=epochs, batch_size=train_batch_size, shuffle=True, rows=learned_from
        ),
        Stage("calibrate", calibrate, finish, rows=held_out),
    )
    return Method(embed, init, stages, score, auxiliary="needed" if penalty else "none")
