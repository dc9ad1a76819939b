"""STFPM: a student network learns a teacher's feature pyramid on normal images, and fails elsewhere.

Stored: a network of the teacher's architecture, trained from scratch to give the teacher's unit feature vectors at
every position of some stages (Eq. 1-3). A position of a stage scores half the squared distance of both vectors; the
heat map is the product of the upsampled maps of all stages (Eq. 4), and an image scores its maximum.

Paper: Student-Teacher Feature Pyramid Matching for Anomaly Detection, BMVC 2021, arXiv:2103.04257.
Reference: https://github.com/gdwang08/STFPM
Differences: maps are multiplied at the size of the image, as in the paper, not on a grid of 64 x 64; all training
    images teach and the last epoch counts, not the best on a fifth of them; the running variance is not corrected for
    the size of a batch; steps are of full batches; Eq. 2's factor of a half is in the heat map, but as in the reference
    not in the loss.
Results: experiments/recipes/stfpm.py
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxad.backbones import backbone as architecture
from jaxad.backbones import features, residual_blocks, student
from jaxad.base import Batch, Frozen, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.ops.cosine import unit
from jaxad.ops.heatmap import upsample_blur
from jaxad.training.checks import above_zero, at_least_one, zero_or_more
from jaxad.training.gradient import Trained, begin, descend_with, mean_of_valid, zero_padding


class StfpmTraining(NamedTuple):
    """The student while it is trained."""

    trained: Trained
    running: PyTree
    """Statistics of its batch norms."""


class StfpmStudent(NamedTuple):
    """The trained student, batch norm folded in."""

    params: PyTree


def distances(maps: dict[str, Float[Array, "b _ _ _"]], teacher: dict[str, Array]) -> dict[str, Float[Array, "b _ _"]]:
    """Squared distances of the student's unit vectors and the teacher's, by stage and position."""
    return {layer: jnp.sum((unit(x) - unit(teacher[layer])) ** 2, -1) for layer, x in maps.items()}


def stfpm(
    *,
    backbone: str = "resnet18",
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
        backbone: The teacher, a ResNet, whose architecture the student has.
        layers: The stages that the student learns; None for its pyramid (layer1 to layer3).
        image_size: (height, width) of the images, which is that of the heat map.
        epochs: Passes over the training images.
        train_batch_size: Images of a step.
        learning_rate: Of SGD.
        momentum: Of SGD.
        weight_decay: Of SGD, added to the gradient.

    Raises:
        ValueError: A hyper-parameter is out of its range, or the backbone no ResNet.
    """
    at_least_one(epochs=epochs, train_batch_size=train_batch_size)
    above_zero(learning_rate=learning_rate)
    zero_or_more(momentum=momentum, weight_decay=weight_decay)
    residual_blocks(backbone)  # raises for what is no ResNet
    network = architecture(backbone)
    layers = network.pyramid_layers if layers is None else tuple(layers)
    learner = student(backbone, layers)
    optimizer = optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum))

    def init(key: Key, frozen: Frozen, spec: PyTree) -> StfpmTraining:
        del frozen, spec
        variables = learner.init(key)
        return StfpmTraining(begin(optimizer, variables["params"]), variables["batch_stats"])

    def train(key: Key, state: StfpmTraining, frozen: Frozen, batch: Batch) -> tuple[StfpmTraining, Metrics]:
        del key
        x = zero_padding(batch.x, batch.valid)

        def loss(params: PyTree) -> Any:
            variables = {"params": params, "batch_stats": state.running}
            maps, running = learner.apply(variables, frozen, x["image"], batch.valid)
            found = [d.mean((1, 2)) for d in distances(maps, x).values()]
            return mean_of_valid(sum(found[1:], found[0]), batch.valid), running

        trained, metrics, running = descend_with(optimizer, state.trained, loss)
        return StfpmTraining(trained, running), metrics

    def finish(key: Key, state: StfpmTraining, frozen: Frozen) -> StfpmStudent:
        del key, frozen
        return StfpmStudent(learner.freeze({"params": state.trained.params, "batch_stats": state.running}))

    def score(state: StfpmStudent, frozen: Frozen, x: dict[str, Array]) -> Scores:
        maps = network.apply(frozen | {"params": state.params}, x["image"], layers)
        pixel = jnp.ones(())
        for found in distances(maps, x).values():
            pixel = pixel * upsample_blur(found / 2, image_size, 0.0)
        return Scores(pixel.max((1, 2)), pixel)

    stage = Stage("train", train, finish, epochs=epochs, batch_size=train_batch_size, shuffle=True)
    return Method(features(backbone, layers, image=True), init, (stage,), score)
