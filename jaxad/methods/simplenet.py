"""SimpleNet: a discriminator tells adapted features of normal patches from the same with noise.

Stored: a linear layer that adapts patch features to the images (Eq. 4), and a discriminator of two layers. Both are
trained to score adapted features above a margin, and those with Gaussian noise below its negative (Eq. 5-7). A patch
scores the negative of the discriminator's output. The heat map is the smoothed upsampling of these scores, and an
image scores its largest patch score (section 3.5).

Family: synthetic
Paper: SimpleNet: A Simple Network for Image Anomaly Detection and Localization, CVPR 2023, arXiv:2303.15140.
Reference: https://github.com/DonaldRR/SimpleNet
Differences: patch features are means of neighborhoods, concatenated over the stages, as in the paper; the reference
    averages runs of channels and positions to one number of channels (0.991 and 0.993 image AUROC on bottles, two seeds
    of 10 epochs on a ResNet-18). An epoch is one pass; the reference has 40 meta-epochs of 4. Images are resized
    without a crop, and the last epoch is kept, not the best on the test images. The adaptor and the layer before the
    batch norm have no bias, which batch norm would cancel; running variances are biased (torch's are not).
Results: experiments/recipes/simplenet.py
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxad.backbones import Backbone, features
from jaxad.backbones import backbone as architecture
from jaxad.base import Batch, Frozen, Ignored, Key, Method, PyTree, Scores
from jaxad.nn.patches import Discriminator
from jaxad.ops.heatmap import counted, patch_features, upsample_blur
from jaxad.training import Descent, gradient_stage, shuffled_parts, statistics_stage
from jaxad.training.checks import above_zero, at_least_one, zero_or_more
from jaxad.training.optimizers import of_parts, torch_adam


class SimplenetNetworks(NamedTuple):
    """The adaptor and the discriminator."""

    params: PyTree
    stats: PyTree
    """Running statistics of the discriminator's batch norm."""


def simplenet(
    *,
    backbone: str | Backbone = "wide_resnet50_2",
    layers: tuple[str, ...] | None = None,
    image_size: tuple[int, int] = (288, 288),
    feature_scale: float = 1.0,
    hidden: int = 1024,
    noise: float = 0.015,
    margin: float = 0.5,
    epochs: int = 160,
    train_batch_size: int = 8,
    rows_per_step: int | None = None,
    precise_statistics: bool = False,
    learning_rate: float = 2e-4,
    adaptor_learning_rate: float = 1e-4,
    weight_decay: float = 1e-5,
    sigma: float = 4.0,
) -> Method:
    """SimpleNet.

    Args:
        backbone: The network that describes patches.
        layers: Its stages, stacked on the grid of the first; None for its patch layers (layer2 and layer3 of a ResNet).
        image_size: (height, width) of the images and of the heat map.
        feature_scale: Factor on the patch features. The default noise suits the features of torchvision's weights;
            those of Caffe's ResNets are several times as large.
        hidden: Units of the discriminator.
        noise: Standard deviation of the noise that makes a feature anomalous.
        margin: Scores beyond it cost nothing.
        epochs: Passes over the training images.
        train_batch_size: Images per step.
        rows_per_step: Patches per step. The patches of as many images are shuffled, or of `train_batch_size` if that is
            more, and every step takes so many of them. None: all patches of `train_batch_size` images, as published.
        precise_statistics: Compute the statistics of the batch norm anew over the training images when training ends.
            The running ones are those of the last few steps, which are of few images unless there is `rows_per_step`.
        learning_rate: Of the discriminator's Adam.
        adaptor_learning_rate: Of the adaptor's AdamW (whose decay is 0.01).
        weight_decay: Of the discriminator, added to the gradient.
        sigma: Smoothing of the heat map in pixels.

    Raises:
        ValueError: A hyperparameter is out of range.
    """
    rows = 1 if rows_per_step is None else rows_per_step
    at_least_one(hidden=hidden, epochs=epochs, train_batch_size=train_batch_size, rows_per_step=rows)
    above_zero(
        feature_scale=feature_scale,
        noise=noise,
        margin=margin,
        learning_rate=learning_rate,
        adaptor_learning_rate=adaptor_learning_rate,
    )
    zero_or_more(weight_decay=weight_decay, sigma=sigma)
    layers = architecture(backbone).patch_layers if layers is None else tuple(layers)
    discriminator = Discriminator(hidden)

    def patches(x: dict[str, Array]) -> Float[Array, "b h w c"]:
        return feature_scale * patch_features(x, layers)

    def init(key: Key, state: None, frozen: Frozen, spec: PyTree) -> SimplenetNetworks:
        del state, frozen
        adaptor_key, discriminator_key = jax.random.split(key)
        c = jax.eval_shape(patches, spec).shape[-1]
        adaptor = jax.nn.initializers.glorot_normal()(adaptor_key, (c, c), jnp.float32)
        variables = discriminator.init(discriminator_key, jnp.zeros((1, 1, 1, c)), train=True)
        params = {"adaptor": adaptor, "discriminator": variables["params"]}
        return SimplenetNetworks(params, variables["batch_stats"])

    def shuffled_patches(key: Key, model: SimplenetNetworks, frozen: Frozen, batch: Batch) -> Float[Array, "s r 1 1 c"]:
        del model, frozen
        features = patches(batch.x)
        return shuffled_parts(key, features.reshape(-1, 1, 1, features.shape[-1]), rows)

    def loss(params: PyTree, model: SimplenetNetworks, key: Key, frozen: Frozen, batch: Any) -> tuple[Array, dict]:
        del frozen
        features = patches(batch.x) if rows_per_step is None else batch
        normal = features @ params["adaptor"]
        noisy = normal + noise * jax.random.normal(key, normal.shape)
        variables = {"params": params["discriminator"], "batch_stats": model.stats}
        both = jnp.concatenate([normal, noisy])
        outputs, changes = discriminator.apply(variables, both, train=True, mutable=["batch_stats"])
        of_normal, of_noisy = jnp.split(outputs, 2)
        value = jnp.maximum(margin - of_normal, 0).mean() + jnp.maximum(margin + of_noisy, 0).mean()
        return value, {"stats": changes["batch_stats"]}

    def score(state: SimplenetNetworks, frozen: Frozen, x: dict[str, Array], ignore: Ignored = None) -> Scores:
        del frozen
        adapted = patches(x) @ state.params["adaptor"]
        variables = {"params": state.params["discriminator"], "batch_stats": state.stats}
        outputs: Any = discriminator.apply(variables, adapted, train=False)
        return Scores(counted(-outputs, ignore).max((1, 2)), upsample_blur(-outputs, image_size, sigma))

    optimizer = of_parts(
        adaptor=optax.adamw(adaptor_learning_rate, weight_decay=0.01),
        discriminator=torch_adam(learning_rate, weight_decay),
    )
    parts = None if rows_per_step is None else shuffled_patches
    descent, images = Descent(loss, optimizer, parts=parts), max(train_batch_size, rows)
    stages = (gradient_stage("train", init, [descent], epochs=epochs, batch_size=images),)
    if precise_statistics:
        stages += (statistics_stage(loss, batch_size=images, parts=parts),)
    return Method(features(backbone, layers), stages, score)
