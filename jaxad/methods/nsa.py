"""NSA: a network learns where pieces of other normal images were cloned in, and how much they changed.

Stored: an encoder, which is a ResNet, and a decoder of transposed residual blocks, both trained from scratch to predict
how much each pixel has changed: in levels (mean squared error), as a logistic function of these, or as yes or no
(binary cross-entropy). The training images have up to `pieces` pieces of another normal image, resized and cloned in
without a seam (section 3). The heat map is the network's output, and an image scores its mean.

Family: synthetic
Paper: Natural Synthetic Anomalies for Self-Supervised Anomaly Detection and Localization, ECCV 2022, arXiv:2109.15222.
Reference: https://github.com/hmsch/natural-synthetic-anomalies
Differences: those of the generator are listed in `jaxad.synthesis.nsa`; pieces come from another image of the batch,
    not from the previous image; Otsu's threshold finds the object, not a given range of brightness (on bottles, the
    intersection of both is 0.99 of their union); images are shifted past their border, where the edge is repeated, not
    cut from larger ones, and rotated with interpolation; running variances are biased (torch's are not, and 3e-4 larger
    in the last stage). What the reference sets per class are hyperparameters here, except different sizes of pieces
    down and across.
Results: experiments/recipes/nsa.py
"""

from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from jaxad.backbones import Backbone, residual_blocks, student
from jaxad.base import Batch, Frozen, Ignored, Key, Method, PyTree, Scores
from jaxad.nn.norm import Convolution
from jaxad.nn.residual import Residual
from jaxad.nn.unet import stretched
from jaxad.ops.image import pixels
from jaxad.synthesis.anomaly import foreground
from jaxad.synthesis.nsa import Label, Sizes, natural_anomaly
from jaxad.synthesis.warp import random_pose
from jaxad.training import cosine, gradient_stage
from jaxad.training.checks import above_zero, at_least_one, multiples_of, zero_or_more

LAYER = "layer4"
"""The last stage of the encoder."""
LEAST_RATE = 1e-3
"""Share of the learning rate that is left at the end."""


class NsaNetwork(NamedTuple):
    """The network, under `encoder` and `decoder`."""

    params: PyTree
    stats: PyTree
    """Running statistics of the batch norms."""


class Decoder(nn.Module):
    """From the encoder's map, of stride 32, to the logits of all pixels."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b H W"]:
        """The logits."""
        for features in (256, 128):
            x = nn.relu(Convolution(features, 1)(x))
        for features in (64, 32, 16):
            x = Residual(features, features, "up", None)(x, train=train)
        return Convolution(1, 7, up=True)(stretched(x))[..., 0]


def nsa(
    *,
    backbone: str | Backbone = "resnet18",
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
        image_size: (height, width) of the images and of the heat map, multiples of 32.
        pieces: Most pieces in an image.
        least_side: Half the smallest side of what is cut out, as a share of the image's, and the smallest side of a
            piece.
        most_side: The same for the largest.
        resize: Smallest and largest factor by which a piece is resized.
        labels: The target for a pixel: whether it has changed ("binary"), by how many levels of 255 ("intensity"), or
            the logistic function of that.
        logistic: Slope and midpoint of that function, in levels of 255.
        mixed: Clone the larger gradients of both images (for textures).
        on_foreground: Pieces show the object and overlap it where they go (for objects).
        least_object: Smallest share of a piece that shows the object.
        least_overlap: Smallest share of that part which lies on the other image's object.
        shift: Largest shift of the images before cloning, in pixels.
        degrees: Largest rotation before cloning, either way (for objects without a fixed orientation).
        mirror: Turn one image in two upside down before cloning (for textures).
        epochs: Passes over the training images.
        train_batch_size: Images per step.
        learning_rate: Of Adam; it falls to a thousandth of itself along a cosine.

    Raises:
        ValueError: A hyperparameter is out of range, or the backbone is not a ResNet.
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
    residual_blocks(backbone)  # raises unless it is a ResNet
    encoder, decoder, sizes = student(backbone, (LAYER,)), Decoder(), Sizes(least_side, most_side)

    def init(key: Key, state: None, frozen: Frozen, spec: PyTree) -> NsaNetwork:
        del state, spec
        encoder_key, decoder_key = jax.random.split(key)
        params, stats = encoder.init(encoder_key)
        maps, _ = encoder.apply(params, stats, frozen, jnp.zeros((1, 64, 64, 3)), train=False)
        variables = decoder.init(decoder_key, maps[LAYER], train=True)
        return NsaNetwork(
            {"encoder": params, "decoder": variables["params"]}, {"encoder": stats, "decoder": variables["batch_stats"]}
        )

    def synthesize(key: Key, target: Array, source: Array) -> tuple[Float[Array, "h w 3"], Float[Array, "h w"]]:
        """A training image with pieces of another, and the labels of its pixels."""
        first, second, draw = jax.random.split(key, 3)
        target, source = (random_pose(k, x, shift, degrees, mirror) for k, x in ((first, target), (second, source)))
        return natural_anomaly(
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

    def loss(params: PyTree, model: NsaNetwork, key: Key, frozen: Frozen, batch: Batch) -> tuple[Array, dict]:
        which, draw = jax.random.split(key)
        image = batch.x.astype(jnp.float32) / 255
        odds = -1e9 * jnp.eye(len(image))  # an image is its own source only in a batch of one
        source = image[jax.random.categorical(which, odds)]
        image, label = jax.vmap(synthesize)(jax.random.split(draw, len(image)), image, source)
        maps, encoder_stats = encoder.apply(params["encoder"], model.stats["encoder"], frozen, image, train=True)
        variables = {"params": params["decoder"], "batch_stats": model.stats["decoder"]}
        logits, changes = decoder.apply(variables, maps[LAYER], train=True, mutable=["batch_stats"])
        if labels == "intensity":
            value = jnp.mean((jax.nn.relu(logits) - 255 * label) ** 2)
        else:
            value = optax.sigmoid_binary_cross_entropy(logits, label).mean()
        return value, {"stats": {"encoder": encoder_stats, "decoder": changes["batch_stats"]}}

    def score(state: NsaNetwork, frozen: Frozen, x: UInt8[Array, "b h w 3"], ignore: Ignored = None) -> Scores:
        maps, _ = encoder.apply(state.params["encoder"], state.stats["encoder"], frozen, x, train=False)
        variables = {"params": state.params["decoder"], "batch_stats": state.stats["decoder"]}
        logits: Any = decoder.apply(variables, maps[LAYER], train=False)
        pixel = jax.nn.relu(logits) if labels == "intensity" else jax.nn.sigmoid(logits)
        return Scores(pixel.mean((1, 2), where=None if ignore is None else ~ignore), pixel)

    def schedule(progress: Float[Array, ""]) -> Float[Array, ""]:
        epoch = jnp.floor(progress * epochs + 1e-3)  # a share of the steps is rounded
        return cosine(epoch / epochs, LEAST_RATE)

    optimizer = optax.adam(learning_rate)
    stage = gradient_stage(
        "train", init, loss, optimizer, epochs=epochs, batch_size=train_batch_size, schedule=schedule
    )
    return Method(pixels, (stage,), score)
