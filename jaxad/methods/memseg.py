"""MemSeg: a network segments synthetic anomalies by how an image differs from the nearest of some normal ones.

Stored: the backbone's maps of some normal images at three stages (the memory); and a network that fuses every stage's
map and its squared difference to the nearest image of the memory (multi-scale feature fusion, with coordinate attention
and the difference as a mask, section 3.4), and decodes them to a mask like a U-Net. Half of the training images have
an anomaly: a texture, or the image itself in tiles out of order, within a shape of Perlin noise on the object (section
3.2). The heat map is the probability of a pixel's being anomalous (softmax), and an image scores the mean of its
largest 100 (of the 65,536 of 256 px; as large a share of other sizes).

Paper: MemSeg: A semi-supervised method for image surface defect detection using differences and commonalities,
    Engineering Applications of Artificial Intelligence 2023, arXiv:2205.00908.
Reference: https://github.com/TooTouch/MemSeg (no official code)
Differences: the backbone stays as it is, with its batch norm folded into its convolutions, and a stem and a fourth
    stage of their own are trained from random weights, drawn as flax's and a ResNet's (in the reference the trained
    stem feeds the frozen stages, whose features move away from the memory); the shuffled image is first changed as the
    paper says, not by three of DRAEM's changes, and its grid is the paper's 4 x 8; textures are drawn from 1,000 at
    most, and made up where none is given; the focal loss is DRAEM's; the object is what Otsu's threshold finds, not a
    given brightness; upsampling is by pixel centers; images are resized without a crop; the running variance is not
    corrected for the size of a batch.
Results: experiments/recipes/memseg.py
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, UInt32

from jaxad.backbones import backbone as architecture
from jaxad.backbones import features, normalize, residual_blocks
from jaxad.base import Batch, Frozen, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.nn import ConvNorm
from jaxad.nn.attention import CoordinateAttention
from jaxad.nn.residual import Residual
from jaxad.nn.unet import doubled
from jaxad.ops.knn import squared_distances
from jaxad.ops.losses import focal_loss
from jaxad.synthesis.anomaly import foreground, shuffled, textured
from jaxad.synthesis.texture import source
from jaxad.training.checks import above_zero, at_least_one, multiples_of, zero_or_more
from jaxad.training.gradient import Trained, begin, descend_with, mean_of_valid, zero_padding

LAYERS = ("layer1", "layer2", "layer3")
"""The backbone's stages, of strides 4, 8 and 16."""
STEM, MASK = 64, 48
"""Channels of the stem, and of the decoder where it has the stem's grid and the image's."""
GRID = (4, 8)
"""Tiles down and across."""
OPACITY = (0.15, 1.0)
L1, FOCAL, GAMMA = 0.6, 0.4, 4.0
"""Weights of both losses, and the exponent of the focal one."""
WARM, LEAST = 0.1, 1 / 30
"""Share of the steps in which the rate rises, and what it begins and ends with, as a share of the largest."""
WORST = 100 / 256**2
"""Share of the pixels that score an image."""
Maps = dict[str, Float[Array, "b _ _ _"]]


class Memory(NamedTuple):
    """Maps of some of the training images, drawn at random."""

    maps: Maps
    draw: Float[Array, "m"]
    """The largest of all training images have a place; negative: a place that no image has taken."""


class MemsegRemembering(NamedTuple):
    """The untrained network, and the memory of the training images so far."""

    params: PyTree
    running: PyTree
    memory: Memory
    seed: UInt32[Array, "k"]
    """Of a number in [0, 1) for every training image."""


class MemsegTraining(NamedTuple):
    """The network while it is trained."""

    trained: Trained
    running: PyTree
    """Statistics of its batch norms."""
    memory: Memory


class MemsegNetwork(NamedTuple):
    """The trained network and the memory."""

    params: PyTree
    running: PyTree
    memory: Memory


class Fused(nn.Module):
    """A stage's map and difference, fused into as many channels as the map has."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c2"], valid: Bool[Array, "b"] | None) -> Float[Array, "b h w c"]:
        """The fused map."""
        c = x.shape[-1]
        x = nn.Conv(c, (3, 3))(x) * CoordinateAttention()(x, valid)
        return nn.Conv(c // 2, (3, 3))(nn.Conv(c // 2, (3, 3))(x))


class Segmenter(nn.Module):
    """The stem, the fourth stage, the fusion of the other three, and the decoder."""

    @nn.compact
    def __call__(
        self, image: Float[Array, "b H W 3"], maps: Maps, differences: Maps, valid: Bool[Array, "b"] | None
    ) -> Float[Array, "b H W 2"]:
        """Logits of being normal and of being anomalous, of a normalized image."""
        c1, c2, c3 = (maps[layer].shape[-1] for layer in LAYERS)
        deep = Residual(2 * c3, 2 * c3, "down")(maps[LAYERS[-1]], valid)
        deep = Residual(2 * c3, 2 * c3)(deep, valid)

        fused = [Fused(name=layer)(jnp.concatenate([maps[layer], differences[layer]], -1), valid) for layer in LAYERS]
        for i, c in ((1, c2), (0, c1)):
            fused[i] = fused[i] + nn.Conv(c, (3, 3))(doubled(fused[i + 1]))
        mask = differences[LAYERS[-1]].mean(-1, keepdims=True)
        masks = [mask]
        for layer in (LAYERS[1], LAYERS[0]):
            masks.append(differences[layer].mean(-1, keepdims=True) * doubled(masks[-1]))
        links = [found * mask for found, mask in zip(fused, masks[::-1], strict=True)]

        def up(x: Array, features: int) -> Array:
            return nn.relu(ConvNorm(features, 3)(doubled(x), valid=valid))

        x = deep
        for link, wide in zip(links[::-1], (c3, c2, c1), strict=True):
            x = jnp.concatenate([up(x, wide), link], -1)
        stem = nn.relu(ConvNorm(STEM, 7, 2)(image, valid=valid))
        x = jnp.concatenate([up(x, MASK), nn.Conv(MASK, (3, 3))(stem)], -1)
        return nn.Conv(2, (3, 3))(up(x, MASK))


def nearest(memory: Memory, maps: Maps) -> Maps:
    """The maps of the image of the memory whose mean squared differences to an image's add up to the least."""

    def flat(x: Array) -> Array:
        return x.reshape(len(x), -1) / jnp.sqrt(jnp.float32(x[0].size))

    apart = jnp.zeros(())
    for layer in LAYERS:
        apart = apart + squared_distances(flat(maps[layer]), flat(memory.maps[layer]))
    index = jnp.argmin(jnp.where(memory.draw < 0, jnp.inf, apart), 1)
    return jax.tree.map(lambda leaf: leaf[index], memory.maps)


def memseg(
    *,
    backbone: str = "resnet18",
    image_size: tuple[int, int] = (256, 256),
    channel_pooling: int = 1,
    feature_scale: float = 1.0,
    memory_size: int = 30,
    on_foreground: bool = True,
    epochs: int = 190,
    train_batch_size: int = 8,
    learning_rate: float = 3e-3,
    weight_decay: float = 5e-4,
) -> Method:
    """MemSeg.

    Args:
        backbone: The encoder, a ResNet, whose layers 1 to 3 stay as they are.
        image_size: (height, width) of the images, multiples of 32; that of the heat map.
        channel_pooling: Neighboring channels of the backbone's maps that are averaged into one; 4 gives those of a
            ResNet-50 the channels of a ResNet-18's.
        feature_scale: What they are multiplied by; masks are products of squared differences, which suit a ResNet-18
            of torchvision, while those of Caffe's ResNets are several times as large.
        memory_size: Training images in the memory.
        on_foreground: Anomalies lie on the object only, which Otsu's threshold finds.
        epochs: Passes over the training images (about 5,000 steps of MVTec's bottle by default).
        train_batch_size: Images of a step.
        learning_rate: The largest of AdamW; it rises for a tenth of the steps and falls as a cosine does.
        weight_decay: Of AdamW.

    Raises:
        ValueError: A hyper-parameter is out of its range, or the backbone no ResNet; when it learns, channels that
            `channel_pooling` does not divide.
    """
    at_least_one(
        channel_pooling=channel_pooling, memory_size=memory_size, epochs=epochs, train_batch_size=train_batch_size
    )
    above_zero(feature_scale=feature_scale, learning_rate=learning_rate)
    zero_or_more(weight_decay=weight_decay)
    multiples_of(32, image_size=image_size)
    residual_blocks(backbone)  # raises for what is no ResNet
    network, segmenter = architecture(backbone), Segmenter()
    optimizer = optax.adamw(learning_rate, weight_decay=weight_decay)

    def pooled(x: dict[str, Array]) -> Maps:
        """The scaled maps with fewer channels."""
        for layer in LAYERS:
            if x[layer].shape[-1] % channel_pooling:
                raise ValueError(f"channel_pooling must divide {x[layer].shape[-1]} channels, got {channel_pooling}")
        apart = {layer: x[layer].reshape(*x[layer].shape[:-1], -1, channel_pooling) for layer in LAYERS}
        return {layer: feature_scale * maps.mean(-1) for layer, maps in apart.items()}

    def segment(
        params: PyTree, running: PyTree, memory: Memory, frozen: Frozen, seen: tuple[Array, Maps], valid: Any
    ) -> tuple[Float[Array, "b h w"], PyTree]:
        """The probability of being anomalous, of an image and its maps, and the new statistics."""
        image, maps = seen
        variables = {"params": params, "batch_stats": running}
        differences = jax.tree.map(lambda a, b: (a - b) ** 2, maps, nearest(memory, maps))
        mutable = ["batch_stats"] if valid is not None else []
        shown = normalize(frozen, image, jnp.float32)
        logits, new = segmenter.apply(variables, shown, maps, differences, valid, mutable=mutable)
        return jax.nn.softmax(logits)[..., 1], new.get("batch_stats", running)

    def init(key: Key, frozen: Frozen, spec: PyTree) -> MemsegRemembering:
        del frozen
        first, second = jax.random.split(key)
        shapes = jax.eval_shape(pooled, spec)
        one = {layer: jnp.zeros((1, *leaf.shape[1:])) for layer, leaf in shapes.items()}
        made = segmenter.init(first, jnp.zeros((1, *image_size, 3)), one, one, jnp.ones(1, bool))
        empty = {layer: jnp.zeros((memory_size, *leaf.shape[1:])) for layer, leaf in shapes.items()}
        memory = Memory(empty, -jnp.ones(memory_size))
        return MemsegRemembering(made["params"], made["batch_stats"], memory, jax.random.key_data(second))

    def remember(key: Key, state: MemsegRemembering, frozen: Frozen, batch: Batch) -> tuple[MemsegRemembering, Metrics]:
        del key, frozen
        seed = jax.random.wrap_key_data(state.seed)
        draw = jax.vmap(lambda index: jax.random.uniform(jax.random.fold_in(seed, index)))(batch.index)
        draw = jnp.where(batch.valid, draw, -1)
        both = jax.tree.map(
            lambda old, new: jnp.concatenate([old, new]),
            state.memory,
            Memory(pooled(zero_padding(batch.x, batch.valid)), draw),
        )
        _, kept = jax.lax.top_k(both.draw, memory_size)
        return state._replace(memory=jax.tree.map(lambda leaf: leaf[kept], both)), {}

    def to_train(key: Key, state: MemsegRemembering, frozen: Frozen) -> MemsegTraining:
        del key, frozen
        return MemsegTraining(begin(optimizer, state.params), state.running, state.memory)

    def spoiled(key: Key, image: Float[Array, "h w 3"], textures: Array | None) -> tuple[Array, Array]:
        """The image with or without an anomaly, and the mask of that."""
        which, texture, tiles, draw = jax.random.split(key, 4)
        anomalous, structural = jax.random.bernoulli(which, shape=(2,))
        texture = source(texture, image_size, textures, None)
        shown = jnp.where(structural, shuffled(tiles, image, GRID), texture)
        within = foreground(image) if on_foreground else None
        made, mask = textured(draw, image, shown, opacity=OPACITY, foreground=within)
        return jnp.where(anomalous, made, image), mask & anomalous

    def train(key: Key, state: MemsegTraining, frozen: Frozen, batch: Batch) -> tuple[MemsegTraining, Metrics]:
        image = zero_padding(batch.x["image"], batch.valid).astype(jnp.float32) / 255
        textures, keys = frozen.get("auxiliary"), jax.random.split(key, len(image))
        made, mask = jax.vmap(lambda key, image: spoiled(key, image, textures))(keys, image)
        seen = made, pooled(network.apply(frozen, made, LAYERS))

        def loss(params: PyTree) -> Any:
            probability, new = segment(params, state.running, state.memory, frozen, seen, batch.valid)
            wrong = jnp.abs(probability - mask.astype(jnp.float32))
            total = L1 * wrong + FOCAL * focal_loss(probability, mask, GAMMA)
            return mean_of_valid(total.mean((1, 2)), batch.valid), new

        falling = 0.5 * (1 + jnp.cos(jnp.pi * (batch.progress - WARM) / (1 - WARM)))
        rate = LEAST + (1 - LEAST) * jnp.where(batch.progress < WARM, batch.progress / WARM, falling)
        trained, metrics, running = descend_with(optimizer, state.trained, loss, rate)
        return state._replace(trained=trained, running=running), metrics

    def finish(key: Key, state: MemsegTraining, frozen: Frozen) -> MemsegNetwork:
        del key, frozen
        return MemsegNetwork(state.trained.params, state.running, state.memory)

    def score(state: MemsegNetwork, frozen: Frozen, x: dict[str, Array]) -> Scores:
        pixel, _ = segment(state.params, state.running, state.memory, frozen, (x["image"], pooled(x)), None)
        worst, _ = jax.lax.top_k(pixel.reshape(len(pixel), -1), max(1, round(WORST * pixel[0].size)))
        return Scores(worst.mean(1), pixel)

    stages = (
        Stage("remember", remember, to_train),
        Stage("train", train, finish, epochs=epochs, batch_size=train_batch_size, shuffle=True),
    )
    return Method(features(backbone, LAYERS, image=True), init, stages, score, auxiliary="optional")
