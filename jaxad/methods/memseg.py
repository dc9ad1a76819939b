"""MemSeg: a network segments synthetic anomalies by the difference between an image and its nearest normal image.

Stored: the backbone's maps of some normal images at three stages (the memory); and a network that fuses the map of
every stage with its squared difference to the nearest image of the memory (multi-scale feature fusion, with coordinate
attention and the difference as a mask, section 3.4), and decodes the result to a mask like a U-Net. Half of the
training images have an anomaly: a texture, or the image itself in shuffled tiles, inside a shape of Perlin noise on the
object (section 3.2). The heat map is the probability of a pixel to be anomalous (softmax), and an image scores the mean
of its largest 100 pixels (of the 65,536 of 256 px; the same share of other sizes).

Family: synthetic
Paper: MemSeg: A semi-supervised method for image surface defect detection using differences and commonalities,
    Engineering Applications of Artificial Intelligence 2023, arXiv:2205.00908.
Reference: https://github.com/TooTouch/MemSeg (no official code)
Differences: the whole backbone stays frozen, with its batch norm folded into its convolutions, and a separate stem and
    fourth stage are trained from random weights, drawn like a ResNet's (in the reference the trained stem feeds the
    frozen stages, whose features drift away from the memory: with its code on MVTec's bottle at 64 px, 200 steps, image
    and pixel AUROC are 0.963 and 0.912, frozen 0.980 and 0.962, with a random stem 0.983 and 0.957); the shuffled image
    is changed as the paper says, not by three of DRAEM's changes, and its grid is the paper's 4 x 8, not 8 x 8;
    textures come from 1,000 photographs at most, and are synthetic without any; the object is found by Otsu's
    threshold, not by a brightness given for every product (on MVTec's bottle their intersection is 0.95 of their
    union); images are resized without a crop; an image with an anomaly is not rounded down to 256 levels (at most 1/255
    of the range); every step takes a full batch; running variances are biased (torch's are not: 3e-4 of a heat map
    after three steps).
Results: experiments/recipes/memseg.py
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, UInt32

from jaxad.backbones import Backbone, features, normalize, residual_blocks
from jaxad.backbones import backbone as architecture
from jaxad.base import Auxiliary, Batch, Frozen, Ignored, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.nn import ConvNorm
from jaxad.nn.attention import CoordinateAttention
from jaxad.nn.initial import torch_bias, torch_uniform
from jaxad.nn.residual import Residual
from jaxad.nn.unet import stretched
from jaxad.ops.heatmap import counted
from jaxad.ops.knn import squared_distances
from jaxad.ops.losses import SMOOTH
from jaxad.synthesis.anomaly import Anomalous, add_texture, foreground, shuffled_tiles
from jaxad.synthesis.texture import source
from jaxad.training import cosine, gradient_stage
from jaxad.training.checks import above_zero, at_least_one, multiples_of, zero_or_more

LAYERS = ("layer1", "layer2", "layer3")
"""The backbone's stages, of strides 4, 8 and 16."""
STEM_CHANNELS, MASK_CHANNELS = 64, 48
"""Channels of the stem, and of the decoder's last two resolutions."""
TILES = (4, 8)
"""Tiles of a shuffled image, down and across."""
OPACITY = (0.15, 1.0)
L1_WEIGHT, FOCAL_WEIGHT, FOCAL_GAMMA = 0.6, 0.4, 4.0
WARMUP, LEAST_RATE = 0.1, 1 / 30
"""Share of the steps in which the learning rate rises, and its first and last value as a share of the largest."""
SCORED_SHARE = 100 / 256**2
"""Share of the pixels that score an image."""
Maps = dict[str, Float[Array, "b _ _ _"]]


class Memory(NamedTuple):
    """The maps of training images that are drawn at random."""

    maps: Maps
    draw: Float[Array, "m"]
    """The memory keeps the images with the largest random numbers; negative marks an empty place."""


class MemsegSampling(NamedTuple):
    """The memory of the training images so far."""

    memory: Memory
    seed: UInt32[Array, "k"]
    """Of the random number in [0, 1) of every training image."""


class MemsegNetwork(NamedTuple):
    """The network and the memory."""

    params: PyTree
    stats: PyTree
    """Running statistics of the batch norms."""
    memory: Memory


def conv(x: Float[Array, "b h w c"], features: int) -> Float[Array, "b h w f"]:
    """A convolution of 3 x 3, with torch's initial values."""
    bias = torch_bias(9 * x.shape[-1])
    return nn.Conv(features, (3, 3), kernel_init=torch_uniform, bias_init=bias)(x)


class Fusion(nn.Module):
    """Fuses the map and the difference of a stage into as many channels as the map has."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c2"], *, train: bool) -> Float[Array, "b h w c"]:
        """The fused map; `train` as in `ConvNorm`."""
        c = x.shape[-1]
        x = conv(x, c) * CoordinateAttention()(x, train=train)
        return conv(conv(x, c // 2), c // 2)


class Segmenter(nn.Module):
    """The stem, the fourth stage, the fusion of the other three, and the decoder."""

    @nn.compact
    def __call__(
        self, image: Float[Array, "b H W 3"], maps: Maps, differences: Maps, *, train: bool
    ) -> Float[Array, "b H W 2"]:
        """The logits of normal and anomalous of every pixel of a normalized image; `train` as in `ConvNorm`."""
        c1, c2, c3 = (maps[layer].shape[-1] for layer in LAYERS)
        x = Residual(2 * c3, 2 * c3, "down")(maps[LAYERS[-1]], train=train)
        x = Residual(2 * c3, 2 * c3)(x, train=train)

        fused = [
            Fusion(name=layer)(jnp.concatenate([maps[layer], differences[layer]], -1), train=train) for layer in LAYERS
        ]
        for i, c in ((1, c2), (0, c1)):
            fused[i] = fused[i] + conv(stretched(fused[i + 1]), c)
        masks = [differences[LAYERS[-1]].mean(-1, keepdims=True)]
        for layer in (LAYERS[1], LAYERS[0]):
            masks.append(differences[layer].mean(-1, keepdims=True) * stretched(masks[-1]))
        skips = [features * mask for features, mask in zip(fused[::-1], masks, strict=True)]

        def up(x: Array, channels: int) -> Array:
            return nn.relu(ConvNorm(channels, 3, kernel_init=torch_uniform)(stretched(x), train=train))

        for skip, channels in zip(skips, (c3, c2, c1), strict=True):
            x = jnp.concatenate([up(x, channels), skip], -1)
        stem = nn.relu(ConvNorm(STEM_CHANNELS, 7, 2)(image, train=train))
        x = jnp.concatenate([up(x, MASK_CHANNELS), conv(stem, MASK_CHANNELS)], -1)
        return conv(up(x, MASK_CHANNELS), 2)


def nearest(memory: Memory, maps: Maps) -> Maps:
    """The maps of the nearest image of the memory, by the sum of the mean squared differences of all stages."""

    def flat(x: Array) -> Array:
        return x.reshape(len(x), -1) / jnp.sqrt(jnp.float32(x[0].size))

    distances = jnp.zeros(())
    for layer in LAYERS:
        distances = distances + squared_distances(flat(maps[layer]), flat(memory.maps[layer]))
    index = jnp.argmin(jnp.where(memory.draw < 0, jnp.inf, distances), 1)
    return jax.tree.map(lambda leaf: leaf[index], memory.maps)


def anomalies(
    key: Key, images: Float[Array, "b h w 3"], photographs: Array | None, on_foreground: bool
) -> tuple[Float[Array, "b h w 3"], Bool[Array, "b h w"]]:
    """Every second image has an anomaly: the images, and the masks of the anomalies."""

    def defective(key: Key, image: Float[Array, "h w 3"]) -> Anomalous:
        which_key, texture_key, tiles_key, anomaly_key = jax.random.split(key, 4)
        height, width, _ = image.shape
        texture = source(texture_key, (height, width), photographs, None)
        structural = jax.random.bernoulli(which_key)
        texture = jnp.where(structural, shuffled_tiles(tiles_key, image, TILES), texture)
        object_mask = foreground(image) if on_foreground else None
        return add_texture(anomaly_key, image, texture, opacity=OPACITY, foreground=object_mask)

    first_key, images_key = jax.random.split(key)
    changed, masks = jax.vmap(defective)(jax.random.split(images_key, len(images)), images)
    anomalous = (jnp.arange(len(images)) % 2 == 0) ^ jax.random.bernoulli(first_key)
    anomalous = anomalous[:, None, None]
    return jnp.where(anomalous[..., None], changed, images), masks & anomalous


def errors(probability: Float[Array, "b h w 2"], mask: Bool[Array, "b h w"]) -> Float[Array, "b h w"]:
    """The absolute and the focal error of every pixel, weighted.

    Args:
        probability: Of normal and anomalous.
        mask: The anomalous pixels.
    """
    label = jnp.stack([~mask, mask], -1).astype(probability.dtype)
    logarithm = jnp.clip(label, SMOOTH, 1 - SMOOTH) * jnp.log(probability + SMOOTH)
    focal = -((1 - probability) ** FOCAL_GAMMA * logarithm).sum(-1)
    return L1_WEIGHT * jnp.abs(probability - label)[..., 1] + FOCAL_WEIGHT * focal


def warmup_cosine(progress: Float[Array, ""]) -> Float[Array, ""]:
    """The schedule: a linear warmup, then a cosine."""
    rising = LEAST_RATE + (1 - LEAST_RATE) * progress / WARMUP
    return jnp.where(progress < WARMUP, rising, cosine((progress - WARMUP) / (1 - WARMUP), LEAST_RATE))


def memseg(
    *,
    backbone: str | Backbone = "resnet18",
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
        backbone: The encoder, a ResNet, whose layers 1 to 3 stay frozen.
        image_size: (height, width) of the images and of the heat map, multiples of 32.
        channel_pooling: Neighboring channels of the backbone's maps that are averaged into one; 4 reduces a ResNet-50
            to the channels of a ResNet-18.
        feature_scale: Factor on the maps. Masks are products of squared differences, which suit a ResNet-18 of
            torchvision; the features of Caffe's ResNets are several times as large.
        memory_size: Training images in the memory.
        on_foreground: Anomalies lie on the object only, which Otsu's threshold finds.
        epochs: Passes over the training images (about 5,000 steps on MVTec's bottle by default).
        train_batch_size: Images per step.
        learning_rate: The largest of AdamW, after a warmup of a tenth of the steps and before a cosine decay.
        weight_decay: Of AdamW.

    Raises:
        ValueError: A hyperparameter is out of range, or the backbone is no ResNet; in training, `channel_pooling` does
            not divide the channels.
    """
    at_least_one(
        channel_pooling=channel_pooling, memory_size=memory_size, epochs=epochs, train_batch_size=train_batch_size
    )
    above_zero(feature_scale=feature_scale, learning_rate=learning_rate)
    zero_or_more(weight_decay=weight_decay)
    multiples_of(32, image_size=image_size)
    residual_blocks(backbone)  # raises for other backbones
    network, segmenter = architecture(backbone), Segmenter()

    def pooled(x: dict[str, Array]) -> Maps:
        """The scaled maps with fewer channels."""
        for layer in LAYERS:
            if x[layer].shape[-1] % channel_pooling:
                raise ValueError(f"channel_pooling must divide {x[layer].shape[-1]} channels, got {channel_pooling}")
        groups = {layer: x[layer].reshape(*x[layer].shape[:-1], -1, channel_pooling) for layer in LAYERS}
        return {layer: feature_scale * maps.mean(-1) for layer, maps in groups.items()}

    def init_memory(key: Key, state: None, frozen: Frozen, spec: PyTree) -> MemsegSampling:
        del state, frozen
        maps = {k: jnp.zeros((memory_size, *leaf.shape[1:])) for k, leaf in jax.eval_shape(pooled, spec).items()}
        return MemsegSampling(Memory(maps, -jnp.ones(memory_size)), jax.random.key_data(key))

    def remember(key: Key, state: MemsegSampling, frozen: Frozen, batch: Batch) -> tuple[MemsegSampling, Metrics]:
        del key, frozen
        seed = jax.random.wrap_key_data(state.seed)
        draw = jax.vmap(lambda index: jax.random.uniform(jax.random.fold_in(seed, index)))(batch.index)
        candidates = Memory(pooled(batch.x), jnp.where(batch.valid, draw, -1))
        candidates = jax.tree.map(lambda old, new: jnp.concatenate([old, new]), state.memory, candidates)
        _, kept = jax.lax.top_k(candidates.draw, memory_size)  # of equal numbers the first, so padding never gets in
        return state._replace(memory=jax.tree.map(lambda leaf: leaf[kept], candidates)), {}

    def leave_memory(key: Key, state: MemsegSampling, frozen: Frozen) -> Memory:
        del key, frozen
        return state.memory

    def init(key: Key, memory: Memory, frozen: Frozen, spec: PyTree) -> MemsegNetwork:
        del frozen, spec
        maps = jax.tree.map(lambda leaf: leaf[:1], memory.maps)
        variables = segmenter.init(key, jnp.zeros((1, *image_size, 3)), maps, maps, train=True)
        return MemsegNetwork(variables["params"], variables["batch_stats"], memory)

    def segment(
        params: PyTree, model: MemsegNetwork, frozen: Frozen, image: Array, maps: Maps, train: bool
    ) -> tuple[Float[Array, "b h w 2"], PyTree]:
        """The probability of every pixel to be normal and anomalous, and the new statistics."""
        variables = {"params": params, "batch_stats": model.stats}
        differences = jax.tree.map(lambda a, b: (a - b) ** 2, maps, nearest(model.memory, maps))
        image = normalize(frozen, image, jnp.float32)
        mutable = ["batch_stats"] if train else []
        logits, changes = segmenter.apply(variables, image, maps, differences, train=train, mutable=mutable)
        return jax.nn.softmax(logits), changes.get("batch_stats")

    def loss(
        params: PyTree, model: MemsegNetwork, key: Key, frozen: Frozen, batch: Batch
    ) -> tuple[Float[Array, ""], dict]:
        image = batch.x["image"].astype(jnp.float32) / 255
        image, mask = anomalies(key, image, batch.auxiliary, on_foreground)
        maps = pooled(network.apply(frozen, image, LAYERS))
        probability, stats = segment(params, model, frozen, image, maps, train=True)
        return errors(probability, mask).mean(), {"stats": stats}

    def score(state: MemsegNetwork, frozen: Frozen, x: dict[str, Array], ignore: Ignored = None) -> Scores:
        probability, _ = segment(state.params, state, frozen, x["image"], pooled(x), train=False)
        pixel = probability[..., 1]
        scored = counted(pixel, ignore).reshape(len(pixel), -1)
        largest, _ = jax.lax.top_k(scored, max(1, round(SCORED_SHARE * pixel[0].size)))
        return Scores(largest.mean(1, where=largest > -jnp.inf), pixel)

    optimizer = optax.adamw(learning_rate, weight_decay=weight_decay)
    stages = (
        Stage("remember", init_memory, remember, leave_memory),
        gradient_stage(
            "train", init, loss, optimizer, epochs=epochs, batch_size=train_batch_size, schedule=warmup_cosine
        ),
    )
    return Method(features(backbone, LAYERS, image=True), stages, score, auxiliary=Auxiliary())
