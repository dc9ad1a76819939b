"""Uninformed Students: an ensemble of students regresses a teacher's patch descriptors, and disagrees on defects.

Stored: for every patch size the mean and deviation of the teacher's channels, several students of its architecture that
learn its standardized descriptors of normal images (Eq. 6), and the mean and deviation of both scores on held-out
normal images. A position scores the squared error of the students' mean (Eq. 8) plus the students' variance (Eq. 9),
both standardized (Eq. 10). Several patch sizes are averaged (Eq. 11), and an image scores its maximum.

Family: distillation
Paper: Uninformed Students: Student-Teacher Anomaly Detection with Discriminative Latent Embeddings, CVPR 2020,
    arXiv:1911.02357.
Reference: https://github.com/denguir/student-teacher-anomaly-detection (no official code)
Differences: descriptors may be sparser than pixels (`stride`), each then at the center of its cell but for half a
    pixel; every tenth training image is held out to standardize the scores, for which the reference takes the images
    that students have learned. As in the paper and not in the reference, students learn the teacher's 128 channels
    without an activation (with random weights, heat maps with one have a correlation of 0.5 with those without), for
    100 epochs (15 there), and images are not flipped. As in the reference, images are padded with zeros after they are
    normalized, here as the teacher's were (to -1..1 there).
Results: experiments/recipes/uninformed_students.py; experiments/distill/teacher.py makes the teachers.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxad.backbones import Backbone, features, student
from jaxad.backbones import backbone as architecture
from jaxad.base import Batch, EmbedFn, Frozen, Ignored, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.ops.gaussian import Moments, channels, channels_update, moments_init
from jaxad.ops.heatmap import counted, upsample_blur
from jaxad.training import gradient_stage
from jaxad.training.checks import above_zero, at_least_one, multiples_of, zero_or_more
from jaxad.training.holdout import holdout_rows, training_rows
from jaxad.training.optimizers import torch_adam


class Scale(NamedTuple):
    """The mean and the deviation of every channel."""

    mean: Float[Array, "c"]
    deviation: Float[Array, "c"]


class Ensembles(NamedTuple):
    """The students and the scale of the teacher's channels, both by backbone."""

    params: dict[str, PyTree]
    teacher: dict[str, Scale]


class Calibrating(NamedTuple):
    """The trained students, and the moments of both scores of held-out images so far."""

    params: dict[str, PyTree]
    teacher: dict[str, Scale]
    moments: dict[str, Moments]


class UninformedStudents(NamedTuple):
    """The trained students and all scales, by backbone."""

    params: dict[str, PyTree]
    teacher: dict[str, Scale]
    scores: dict[str, Scale]
    """Of the regression error and the predictive variance."""


@functools.lru_cache
def teacher_features(networks: tuple[Backbone, ...], layer: str) -> EmbedFn:
    """The `embed`: the image, and every teacher's map of it."""
    embeds = [features(network, (layer,), image=True) for network in networks]

    def embed(frozen: Frozen, image: Array) -> dict[str, Array]:
        x = {}
        for network, part, weights in zip(networks, embeds, weights_of_each(frozen), strict=True):
            maps = part(weights, image)
            x |= {"image": maps["image"], network.name: maps[layer]}
        return x

    return embed


def weights_of_each(frozen: Frozen) -> tuple[Frozen, ...]:
    """The weights of every teacher."""
    return frozen if isinstance(frozen, tuple) else (frozen,)


def uninformed_students(
    *,
    backbone: str | Backbone | tuple[str | Backbone, ...] = ("patch17", "patch33", "patch65"),
    image_size: tuple[int, int] = (256, 256),
    num_students: int = 3,
    stride: int = 1,
    epochs: int = 100,
    train_batch_size: int = 1,
    learning_rate: float = 1e-4,
    weight_decay: float = 1e-5,
) -> Method:
    """Uninformed Students.

    Args:
        backbone: The teacher, a patch network; several make several scales, and `frozen` is then a tuple.
        image_size: (height, width) of the images and of the heat map, multiples of the stride.
        num_students: Students of every teacher.
        stride: Pixels between the patches that are described: 1, 2, 4 or 8.
        epochs: Passes over the training images.
        train_batch_size: Images per step.
        learning_rate: Of Adam.
        weight_decay: Of Adam, added to the gradient.

    Raises:
        ValueError: A hyperparameter is out of range, or a backbone is no patch network or occurs twice.
    """
    at_least_one(num_students=num_students, epochs=epochs, train_batch_size=train_batch_size)
    above_zero(learning_rate=learning_rate)
    zero_or_more(weight_decay=weight_decay)
    networks = tuple(map(architecture, (backbone,) if isinstance(backbone, str | Backbone) else backbone))
    names = tuple(network.name for network in networks)
    if not networks or any(network.family != "patchnet" for network in networks):
        raise ValueError(
            "the backbones must be patch17, patch33 or patch65, whose weights experiments/distill/teacher.py makes, "
            f"got {', '.join(names) or 'none'}"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"the backbones must differ, got {', '.join(names)}")
    if stride not in (1, 2, 4, 8):
        raise ValueError(f"stride must be 1, 2, 4 or 8, got {stride}")
    multiples_of(stride, image_size=image_size)
    layer = f"stride{stride}"
    learners = {network.name: student(network, (layer,)) for network in networks}

    def student_maps(params: PyTree, frozen: Frozen, image: Array) -> dict[str, Float[Array, "s b h w c"]]:
        """The maps of all students, by backbone."""

        def of_ensemble(name: str, weights: Frozen) -> Array:
            apply = lambda params: learners[name].apply(params, {}, weights, image, train=False)[0][layer]  # noqa: E731
            return jax.vmap(apply)(params[name])

        return {name: of_ensemble(name, weights) for name, weights in zip(names, weights_of_each(frozen), strict=True)}

    def standardized(teacher: dict[str, Scale], x: dict[str, Array]) -> dict[str, Float[Array, "b h w c"]]:
        return {name: (x[name] - teacher[name].mean) / teacher[name].deviation for name in names}

    def scales(key: Key, moments: dict[str, Moments], frozen: Frozen) -> dict[str, Scale]:
        del key, frozen
        return {name: Scale(*channels(moments[name])) for name in names}

    def init_moments(key: Key, state: None, frozen: Frozen, spec: PyTree) -> dict[str, Moments]:
        del key, state, frozen
        return {name: moments_init((spec[name].shape[-1], 1)) for name in names}

    def measure(
        key: Key, state: dict[str, Moments], frozen: Frozen, batch: Batch
    ) -> tuple[dict[str, Moments], Metrics]:
        del key, frozen
        return {name: channels_update(state[name], batch.x[name], batch.valid) for name in names}, {}

    def init(key: Key, teacher: dict[str, Scale], frozen: Frozen, spec: PyTree) -> Ensembles:
        del frozen, spec
        keys = jax.random.split(key, (len(names), num_students))
        params = {name: jax.vmap(learners[name].init)(keys)[0] for name, keys in zip(names, keys, strict=True)}
        return Ensembles(params, teacher)

    def loss(params: PyTree, model: Ensembles, key: Key, frozen: Frozen, batch: Batch) -> tuple[Array, dict]:
        """The sum of the students' losses; the one that is reported is their mean."""
        del key
        targets, maps = standardized(model.teacher, batch.x), student_maps(params, frozen, batch.x["image"])
        losses = jnp.stack([((maps[name] - targets[name]) ** 2).sum(-1).mean((1, 2, 3)) for name in names])
        return losses.sum(), {"metrics": {"loss": losses.mean()}}

    def both_scores(model: Any, frozen: Frozen, x: dict[str, Array]) -> dict[str, Float[Array, "b h w 2"]]:
        """The regression error and the predictive variance of every position (Eq. 8 and 9), by backbone."""
        targets, maps = standardized(model.teacher, x), student_maps(model.params, frozen, x["image"])

        def of_ensemble(maps: Array, target: Array) -> Array:
            mean = maps.mean(0)
            return jnp.stack([((mean - target) ** 2).sum(-1), ((maps - mean) ** 2).sum(-1).mean(0)], -1)

        return {name: of_ensemble(maps[name], targets[name]) for name in names}

    def init_calibration(key: Key, state: Ensembles, frozen: Frozen, spec: PyTree) -> Calibrating:
        del key, frozen, spec
        return Calibrating(*state, {name: moments_init((2, 1)) for name in names})

    def calibrate(key: Key, state: Calibrating, frozen: Frozen, batch: Batch) -> tuple[Calibrating, Metrics]:
        del key
        scores = both_scores(state, frozen, batch.x)
        moments = {name: channels_update(state.moments[name], scores[name], batch.valid) for name in names}
        return state._replace(moments=moments), {}

    def finish(key: Key, state: Calibrating, frozen: Frozen) -> UninformedStudents:
        return UninformedStudents(state.params, state.teacher, scales(key, state.moments, frozen))

    def score(state: UninformedStudents, frozen: Frozen, x: dict[str, Array], ignore: Ignored = None) -> Scores:
        pixel = jnp.zeros(())
        for name, scores in both_scores(state, frozen, x).items():
            scale = state.scores[name]
            scores = ((scores - scale.mean) / scale.deviation).sum(-1)
            pixel = pixel + upsample_blur(scores, image_size, 0.0) / len(names)
        return Scores(counted(pixel, ignore).max((1, 2)), pixel)

    optimizer = torch_adam(learning_rate, weight_decay)
    stages = (
        Stage("measure", init_moments, measure, scales, rows=training_rows),
        gradient_stage("train", init, loss, optimizer, epochs=epochs, batch_size=train_batch_size, rows=training_rows),
        Stage("calibrate", init_calibration, calibrate, finish, rows=holdout_rows),
    )
    return Method(teacher_features(networks, layer), stages, score)
