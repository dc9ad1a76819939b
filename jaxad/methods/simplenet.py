"""SimpleNet: a discriminator tells adapted features of normal patches from the same with noise.

Stored: a linear layer that adapts patch features to the images (Eq. 4), and a discriminator of two layers, trained
together to score adapted features above a margin and those with Gaussian noise below its negative (Eq. 5-7). A patch
scores the negative of the discriminator; the heat map is the smoothed upsampling of that, and an image scores the
largest of its patches (section 3.5).

Paper: SimpleNet: A Simple Network for Image Anomaly Detection and Localization, CVPR 2023, arXiv:2303.15140.
Reference: https://github.com/DonaldRR/SimpleNet
Differences: patch features are means of neighborhoods, side by side, as in the paper; the code pools their channels to
    one number for all stages. An epoch is one pass; the code has 40 meta-epochs of 4. Images are resized without a
    crop, and the last epoch counts, not the best on the test images. No layer
    before the batch norm has a bias, which that takes away; its running variance is not corrected for the size of a
    batch.
Results: experiments/recipes/simplenet.py
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxad.backbones import backbone as architecture
from jaxad.backbones import features
from jaxad.base import Batch, Frozen, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.nn.patches import Discriminator
from jaxad.ops.heatmap import patch_features, upsample_blur
from jaxad.training.checks import above_zero, at_least_one, zero_or_more
from jaxad.training.gradient import Trained, begin, descend_with, mean_of_valid, of_parts, torch_adam, zero_padding


class SimplenetTraining(NamedTuple):
    """Adaptor and discriminator while they are trained."""

    trained: Trained
    running: PyTree
    """Statistics of the discriminator's batch norm."""


class SimplenetDiscriminator(NamedTuple):
    """The trained adaptor and discriminator."""

    params: PyTree
    running: PyTree


def simplenet(
    *,
    backbone: str = "wide_resnet50_2",
    layers: tuple[str, ...] | None = None,
    image_size: tuple[int, int] = (288, 288),
    feature_scale: float = 1.0,
    hidden: int = 1024,
    noise: float = 0.015,
    margin: float = 0.5,
    epochs: int = 160,
    train_batch_size: int = 8,
    learning_rate: float = 2e-4,
    adaptor_learning_rate: float = 1e-4,
    weight_decay: float = 1e-5,
    sigma: float = 4.0,
) -> Method:
    """SimpleNet.

    Args:
        backbone: The network that describes patches.
        layers: Its stages, stacked on the grid of the first; None for those of patches (layer2 and layer3 of a ResNet).
        image_size: (height, width) of the images, which is that of the heat map.
        feature_scale: What patch features are multiplied by. The noise suits weights like torchvision's; the
            features of Caffe's ResNets are several times as large.
        hidden: Units of the discriminator.
        noise: Standard deviation of what makes a feature anomalous.
        margin: Scores beyond it cost nothing.
        epochs: Passes over the training images.
        train_batch_size: Images of a step.
        learning_rate: Of the discriminator's Adam.
        adaptor_learning_rate: Of the adaptor's AdamW (whose decay is 0.01).
        weight_decay: Of the discriminator, added to the gradient.
        sigma: Smoothing of the heat map in pixels.

    Raises:
        ValueError: A hyper-parameter is out of its range.
    """
    at_least_one(hidden=hidden, epochs=epochs, train_batch_size=train_batch_size)
    above_zero(
        feature_scale=feature_scale,
        noise=noise,
        margin=margin,
        learning_rate=learning_rate,
        adaptor_learning_rate=adaptor_learning_rate,
    )
    zero_or_more(weight_decay=weight_decay, sigma=sigma)
    layers = architecture(backbone).patch_layers if layers is None else tuple(layers)
    optimizer = of_parts(
        adaptor=optax.adamw(adaptor_learning_rate, weight_decay=0.01),
        discriminator=torch_adam(learning_rate, weight_decay),
    )
    discriminator = Discriminator(hidden)

    def patches(x: dict[str, Array]) -> Float[Array, "b h w c"]:
        return feature_scale * patch_features(x, layers)

    def init(key: Key, frozen: Frozen, spec: PyTree) -> SimplenetTraining:
        del frozen
        first, second = jax.random.split(key)
        c = jax.eval_shape(patches, spec).shape[-1]
        made = discriminator.init(second, jnp.zeros((1, 1, 1, c)), valid=jnp.ones(1, bool))
        adaptor = jax.nn.initializers.glorot_normal()(first, (c, c), jnp.float32)
        params = {"adaptor": adaptor, "discriminator": made["params"]}
        return SimplenetTraining(begin(optimizer, params), made["batch_stats"])

    def train(key: Key, state: SimplenetTraining, frozen: Frozen, batch: Batch) -> tuple[SimplenetTraining, Metrics]:
        del frozen
        found = patches(zero_padding(batch.x, batch.valid))
        shift = noise * jax.random.normal(key, found.shape)

        def loss(params: PyTree) -> Any:
            normal = found @ params["adaptor"]
            both = jnp.concatenate([normal, normal + shift])
            variables = {"params": params["discriminator"], "batch_stats": state.running}
            valid = jnp.concatenate([batch.valid, batch.valid])
            scores, new = discriminator.apply(variables, both, valid=valid, mutable=["batch_stats"])
            of_normal, of_noisy = jnp.split(scores, 2)
            lost = jnp.maximum(margin - of_normal, 0) + jnp.maximum(margin + of_noisy, 0)
            return mean_of_valid(lost.mean((1, 2)), batch.valid), new["batch_stats"]

        trained, metrics, running = descend_with(optimizer, state.trained, loss)
        return SimplenetTraining(trained, running), metrics

    def finish(key: Key, state: SimplenetTraining, frozen: Frozen) -> SimplenetDiscriminator:
        del key, frozen
        return SimplenetDiscriminator(state.trained.params, state.running)

    def score(state: SimplenetDiscriminator, frozen: Frozen, x: dict[str, Array]) -> Scores:
        del frozen
        adapted = patches(x) @ state.params["adaptor"]
        variables = {"params": state.params["discriminator"], "batch_stats": state.running}
        scores: Any = discriminator.apply(variables, adapted, valid=None)
        return Scores((-scores).max((1, 2)), upsample_blur(-scores, image_size, sigma))

    stage = Stage("train", train, finish, epochs=epochs, batch_size=train_batch_size, shuffle=True)
    return Method(features(backbone, layers), init, (stage,), score)
