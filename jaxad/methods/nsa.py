"""NSA: a network learns where pieces of other normal images were cloned in, and how much they changed.

Stored: an encoder, which is a ResNet, and a decoder of transposed residual blocks, both trained from scratch to say of
every pixel how much it has changed: in levels (mean squared error), by a logistic function of these, or by yes or no
(binary cross-entropy). The images have up to `pieces` pieces of another normal image, resized and cloned in without a
seam (section 3). The heat map is what the network says, and an image scores its mean.

Paper: Natural Synthetic Anomalies for Self-Supervised Anomaly Detection and Localization, ECCV 2022, arXiv:2109.15222.
Reference: https://github.com/hmsch/natural-synthetic-anomalies
Differences: the generator's are told in `jaxad.ops.nsa`; pieces come from another image of the batch, not from the one
    before; the object is what Otsu's threshold finds, not a given range of brightness; images are moved over their
    border, where the edge goes on, not cut from larger ones; bilinear upsampling is by pixel centers; the rate falls
    with every step, not every epoch; the running variance is not corrected for the size of a batch. What the reference
    sets by class are hyper-parameters here, but for sides that differ down and across.
Results: experiments/recipes/nsa.py
"""

from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, UInt8

from jaxad.backbones import residual_blocks, student
from jaxad.base import Batch, Frozen, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.nn.norm import Convolution
from jaxad.nn.residual import Residual
from jaxad.nn.unet import doubled
from jaxad.ops.image import pixels
from jaxad.synthesis.anomaly import foreground
from jaxad.synthesis.nsa import Label, Sizes, natural
from jaxad.synthesis.warp import moved
from jaxad.training.checks import above_zero, at_least_one, multiples_of, zero_or_more
from jaxad.training.gradient import Trained, begin, descend_with, mean_of_valid, zero_padding

LAYER = "layer4"
LAST = 1e-3
"""Share of the learning rate that is left at the end."""


class NsaTraining(NamedTuple):
    """Encoder and decoder while they are trained."""

    trained: Trained
    running: PyTree
    """Statistics of their batch norms."""


class NsaNetwork(NamedTuple):
    """The trained encoder and decoder."""

    params: PyTree
    running: PyTree


class Decoder(nn.Module):
    """From the encoder's map, of stride 32, to the logits of all pixels."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], valid: Bool[Array, "b"] | None) -> Float[Array, "b H W"]:
        """The logits."""
        for features in (256, 128):
            x = nn.relu(Convolution(features, 1)(x))
        for features in (64, 32, 16):
            x = Residual(features, features, "up", None)(x, valid)
        return Convolution(1, 7, up=True)(doubled(x))[..., 0]


def nsa(
    *,
    backbone: str = "resnet18",
    image_size: tuple[int, int] = (224, 224),
    pieces: int = 3,
    least_side: float = 0.03,
    most_side: float = 0.4,
    resize: tuple[float, float] = (0.7, 1.3),
    labels: Label = "logistic",
    logistic: tuple[float, float] = (1 / 12, 24.0),
    mixed: bool = False,
    on_foreground: bool = True,
    least_object: float = 0.7,
    least_overlap: float = 0.25,
    shift: int = 3,
    degrees: float = 5.0,
    mirror: bool = False,
    epochs: int = 320,
    train_batch_size: int = 64,
    learning_rate: float = 1e-3,
) -> Method:
    """NSA; the defaults are those of the reference for MVTec's bottle.

    Args:
        backbone: The encoder, a ResNet.
        image_size: (height, width) of the images, multiples of 32; that of the heat map.
        pieces: Cloned into an image at most.
        least_side: Half the least side of what is cut out, as a share of the image's, and the least one of a piece.
        most_side: The same of the largest.
        resize: Least and largest factor by which a piece is resized.
        labels: What the network learns of a pixel: whether it has changed ("binary"), by how many levels of 255
            ("intensity"), or the logistic function of that.
        logistic: Slope and middle of that function, in levels of 255.
        mixed: The larger gradients of both images are cloned (for textures).
        on_foreground: Pieces show the object, and lie on it (for objects).
        least_object: Least share of a piece that shows the object.
        least_overlap: Least share of that which lies on the other image's object.
        shift: Pixels that images are moved by before, at most.
        degrees: They are rotated by so much before, at most (for objects that lie as they come).
        mirror: One of two is turned upside down before (for textures).
        epochs: Passes over the training images.
        train_batch_size: Images of a step.
        learning_rate: Of Adam; it falls to a thousandth as a cosine does.

    Raises:
        ValueError: A hyper-parameter is out of its range, or the backbone no ResNet.
    """
    at_least_one(pieces=pieces, epochs=epochs, train_batch_size=train_batch_size)
    above_zero(learning_rate=learning_rate)
    zero_or_more(shift=shift, degrees=degrees)
    multiples_of(32, image_size=image_size)
    if not 0 < least_side < most_side <= 0.5:
        raise ValueError(f"0 < least_side < most_side <= 0.5 must hold, got {least_side} and {most_side}")
    if not 0 < resize[0] <= resize[1]:
        raise ValueError(f"resize must be two factors above 0, the smaller first, got {resize}")
    for name, share in (("least_object", least_object), ("least_overlap", least_overlap)):
        if not 0 <= share < 1:
            raise ValueError(f"{name} must be in [0, 1), got {share}")
    if labels not in get_args(Label):
        raise ValueError(f"labels must be one of {', '.join(get_args(Label))}, got {labels!r}")
    above_zero(logistic=logistic[0])
    residual_blocks(backbone)  # raises for what is no ResNet
    encoder, decoder, optimizer = student(backbone, (LAYER,)), Decoder(), optax.adam(learning_rate)
    sizes = Sizes(least_side, most_side)

    def init(key: Key, frozen: Frozen, spec: PyTree) -> NsaTraining:
        del spec
        first, second = jax.random.split(key)
        made = {"encoder": encoder.init(first)}
        one, valid = jnp.zeros((1, 64, 64, 3)), jnp.ones(1, bool)
        maps, _ = encoder.apply(made["encoder"], frozen, one, valid)
        made["decoder"] = decoder.init(second, maps[LAYER], valid)
        params, running = ({name: part[kind] for name, part in made.items()} for kind in ("params", "batch_stats"))
        return NsaTraining(begin(optimizer, params), running)

    def spoiled(key: Key, target: Array, source: Array) -> tuple[Float[Array, "h w 3"], Float[Array, "h w"]]:
        """A training image with pieces of another, and the label of its pixels."""
        first, second, draw = jax.random.split(key, 3)
        target, source = (moved(k, x, shift, degrees, mirror) for k, x in ((first, target), (second, source)))
        return natural(
            draw,
            target,
            source,
            foregrounds=(foreground(target), foreground(source)) if on_foreground else None,
            pieces=pieces,
            sizes=sizes,
            resize=resize,
            least_object=least_object,
            least_overlap=least_overlap,
            mixed=mixed,
            labels=labels,
            logistic=logistic,
        )

    def train(key: Key, state: NsaTraining, frozen: Frozen, batch: Batch) -> tuple[NsaTraining, Metrics]:
        which, draw = jax.random.split(key)
        image = zero_padding(batch.x, batch.valid).astype(jnp.float32) / 255
        odds = jnp.where(batch.valid, 0.0, -jnp.inf) - 1e9 * jnp.eye(len(image))  # itself only where it is alone
        other = image[jax.random.categorical(which, odds)]
        made, label = jax.vmap(spoiled)(jax.random.split(draw, len(image)), image, other)

        def loss(params: PyTree) -> Any:
            variables = {name: {"params": params[name], "batch_stats": state.running[name]} for name in params}
            maps, running = encoder.apply(variables["encoder"], frozen, made, batch.valid)
            logits, new = decoder.apply(variables["decoder"], maps[LAYER], batch.valid, mutable=["batch_stats"])
            if labels == "intensity":
                lost = (jax.nn.relu(logits) - 255 * label) ** 2
            else:
                lost = optax.sigmoid_binary_cross_entropy(logits, label)
            return mean_of_valid(lost.mean((1, 2)), batch.valid), {"encoder": running, "decoder": new["batch_stats"]}

        rate = LAST + (1 - LAST) * 0.5 * (1 + jnp.cos(jnp.pi * batch.progress))
        trained, metrics, running = descend_with(optimizer, state.trained, loss, rate)
        return NsaTraining(trained, running), metrics

    def finish(key: Key, state: NsaTraining, frozen: Frozen) -> NsaNetwork:
        del key, frozen
        return NsaNetwork(state.trained.params, state.running)

    def score(state: NsaNetwork, frozen: Frozen, x: UInt8[Array, "b h w 3"]) -> Scores:
        variables = {name: {"params": state.params[name], "batch_stats": state.running[name]} for name in state.params}
        maps, _ = encoder.apply(variables["encoder"], frozen, x, None)
        logits: Any = decoder.apply(variables["decoder"], maps[LAYER], None)
        pixel = jax.nn.relu(logits) if labels == "intensity" else jax.nn.sigmoid(logits)
        return Scores(pixel.mean((1, 2)), pixel)

    stage = Stage("train", train, finish, epochs=epochs, batch_size=train_batch_size, shuffle=True)
    return Method(pixels, init, (stage,), score)
