"""STFPM: a student network learns a teacher's feature pyramid on normal images, and fails elsewhere.

Stored: a network of the teacher's architecture, trained from scratch to predict the teacher's unit feature vectors at
every position of several stages (Eq. 1-3). A position of a stage scores half the squared distance between the two
vectors. The heat map is the product of the upsampled maps of all stages (Eq. 4), and an image scores its maximum.

Family: distillation
Paper: Student-Teacher Feature Pyramid Matching for Anomaly Detection, BMVC 2021, arXiv:2103.04257.
Reference: https://github.com/gdwang08/STFPM
Differences: maps are multiplied at the size of the image, as in the paper, not on a grid of 64 x 64 (6.7e-2 of a heat
    map at 256 px, 2.3e-2 of its maximum); the student trains on all images and its last epoch is kept, where the
    reference keeps the best epoch on a fifth of the images; running variances are biased (torch's are not: 4e-4 of a
    heat map after three steps); every step takes a full batch; the factor 1/2 of Eq. 2 is in the heat map but, as in
    the reference, not in the loss.
Results: experiments/recipes/stfpm.py
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxad.backbones import Backbone, features, residual_blocks, student
from jaxad.backbones import backbone as architecture
from jaxad.base import Batch, Frozen, Ignored, Key, Method, PyTree, Scores
from jaxad.ops.cosine import unit
from jaxad.ops.heatmap import counted, upsample_blur
from jaxad.training import gradient_stage
from jaxad.training.checks import above_zero, at_least_one, zero_or_more
from jaxad.training.optimizers import torch_sgd


class StfpmTraining(NamedTuple):
    """The student during training."""

    params: PyTree
    stats: PyTree
    """Running statistics of its batch norms."""


class StfpmStudent(NamedTuple):
    """The trained student, with its batch norms folded into the convolutions."""

    params: PyTree


def distances(maps: dict[str, Float[Array, "b _ _ _"]], teacher: dict[str, Array]) -> dict[str, Float[Array, "b _ _"]]:
    """Squared distances between the unit vectors of student and teacher, by stage and position."""
    return {layer: jnp.sum((unit(x) - unit(teacher[layer])) ** 2, -1) for layer, x in maps.items()}


def stfpm(
    *,
    backbone: str | Backbone = "resnet18",
    layers: tuple[str, ...] | None = None,
    image_size: tuple[int, int] = (256, 256),
    epochs: int = 100,
    train_batch_size: int = 32,
    learning_rate: float = 0.4,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
) -> Method:
    """STFPM.

    Args:
        backbone: The teacher, a ResNet; the student has the same architecture.
        layers: The stages that the student learns; None for the teacher's pyramid (layer1 to layer3).
        image_size: (height, width) of the images and of the heat map.
        epochs: Passes over the training images.
        train_batch_size: Images per step.
        learning_rate: Of SGD.
        momentum: Of SGD.
        weight_decay: Of SGD, added to the gradient.

    Raises:
        ValueError: A hyperparameter is out of range, or the backbone is not a ResNet.
    """
    at_least_one(epochs=epochs, train_batch_size=train_batch_size)
    above_zero(learning_rate=learning_rate)
    zero_or_more(momentum=momentum, weight_decay=weight_decay)
    residual_blocks(backbone)  # raises unless it is a ResNet
    network = architecture(backbone)
    layers = network.pyramid_layers if layers is None else tuple(layers)
    learner = student(backbone, layers)

    def init(key: Key, state: None, frozen: Frozen, spec: PyTree) -> StfpmTraining:
        del state, frozen, spec
        return StfpmTraining(*learner.init(key))

    def loss(params: PyTree, model: StfpmTraining, key: Key, frozen: Frozen, batch: Batch) -> tuple[Array, dict]:
        del key
        maps, stats = learner.apply(params, model.stats, frozen, batch.x["image"], train=True)
        return sum((d.mean() for d in distances(maps, batch.x).values()), jnp.zeros(())), {"stats": stats}

    def freeze(key: Key, model: StfpmTraining, frozen: Frozen) -> StfpmStudent:
        del key, frozen
        return StfpmStudent(learner.freeze(model.params, model.stats))

    def score(state: StfpmStudent, frozen: Frozen, x: dict[str, Array], ignore: Ignored = None) -> Scores:
        maps = network.apply(frozen | {"params": state.params}, x["image"], layers)
        pixel = jnp.ones(())
        for distance in distances(maps, x).values():
            pixel = pixel * upsample_blur(distance / 2, image_size, 0.0)
        return Scores(counted(pixel, ignore).max((1, 2)), pixel)

    optimizer = torch_sgd(learning_rate, momentum, weight_decay)
    stage = gradient_stage("train", init, loss, optimizer, epochs=epochs, batch_size=train_batch_size, finish=freeze)
    return Method(features(backbone, layers, image=True), (stage,), score)
