"""Skeleton: a small network predicts each patch from its surroundings. Copy this file to jaxad/methods/<name>.py.

Stored: a network that is given the patch features of an image without each patch itself, and predicts them. A patch
scores the squared error of the prediction; the heat map is the upsampled patch scores, and an image scores the maximum
of its heat map. (Give equation numbers.)

Family: features
Paper: none; a real method gives title, venue and link.
Reference: none; a real method links the official code, or names the reimplementation that it was compared with.
Differences: none. (List every deliberate deviation from the paper, with the reason.)
Results: none; a real method names its recipes, experiments/recipes/<name>.py.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxad.backbones import Backbone, features
from jaxad.base import Batch, Frozen, Ignored, Key, Method, PyTree, Scores
from jaxad.nn import ConvNorm
from jaxad.ops.heatmap import counted, neighborhood_mean, upsample_blur
from jaxad.training import cosine, gradient_stage
from jaxad.training.checks import above_zero, at_least_one, zero_or_more
from jaxad.training.optimizers import torch_adam


class SkeletonModel(NamedTuple):
    """The network. It has a field `params`, which the optimizer changes; the loss replaces other fields."""

    params: PyTree
    stats: PyTree
    """Running statistics of its batch norms."""


class Predictor(nn.Module):
    """The mean of the eight patches around each patch, through a hidden layer with batch norm."""

    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        """The predicted patches; with `train` batch norm uses the statistics of the batch."""
        around = (9 * neighborhood_mean(x, 3) - x) / 8
        hidden = nn.relu(ConvNorm(self.hidden, 1)(around, train=train))
        return nn.Dense(x.shape[-1])(hidden)


def skeleton(
    *,
    backbone: str | Backbone = "resnet18",
    layer: str = "layer2",
    image_size: tuple[int, int] = (224, 224),
    hidden: int = 128,
    epochs: int = 40,
    train_batch_size: int = 16,
    learning_rate: float = 1e-3,
    sigma: float = 4.0,
) -> Method:
    """Skeleton.

    Args:
        backbone: The network that extracts the features.
        layer: Its stage.
        image_size: (height, width) of the images and of the heat map.
        hidden: Channels of the hidden layer.
        epochs: Passes over the training images.
        train_batch_size: Images per step.
        learning_rate: Of Adam; it falls to zero as a cosine does.
        sigma: Smoothing of the heat map in pixels.

    Raises:
        ValueError: A hyperparameter is out of its range.
    """
    at_least_one(hidden=hidden, epochs=epochs, train_batch_size=train_batch_size)
    above_zero(learning_rate=learning_rate)
    zero_or_more(sigma=sigma)
    predictor = Predictor(hidden)

    def init(key: Key, state: None, frozen: Frozen, spec: PyTree) -> SkeletonModel:
        del state, frozen  # a later stage is given what the stage before left as `state`
        variables = predictor.init(key, jnp.zeros((1, *spec[layer].shape[1:])), train=True)
        return SkeletonModel(variables["params"], variables["batch_stats"])

    def loss(params: PyTree, model: SkeletonModel, key: Key, frozen: Frozen, batch: Batch) -> tuple[Array, dict]:
        del key, frozen
        x = batch.x[layer]  # a full batch of real images: gradient stages never see padding
        variables = {"params": params, "batch_stats": model.stats}
        predicted, updated = predictor.apply(variables, x, train=True, mutable=["batch_stats"])
        return jnp.mean((predicted - x) ** 2), {"stats": updated["batch_stats"]}

    def score(state: SkeletonModel, frozen: Frozen, x: dict[str, Array], ignore: Ignored = None) -> Scores:
        del frozen
        variables = {"params": state.params, "batch_stats": state.stats}
        errors = jnp.mean((predictor.apply(variables, x[layer], train=False) - x[layer]) ** 2, -1)
        pixel = upsample_blur(errors, image_size, sigma)
        return Scores(counted(pixel, ignore).max((1, 2)), pixel)

    stage = gradient_stage(
        "train",
        init,
        loss,
        torch_adam(learning_rate),
        epochs=epochs,
        batch_size=train_batch_size,
        schedule=cosine,
    )
    return Method(features(backbone, (layer,)), (stage,), score)
