"""Uninformed Students: an ensemble of students regresses a teacher's patch descriptions, and disagrees on defects.

Stored: for every patch size the mean and deviation of the teacher's channels, several students of its architecture that
learn its standardized descriptions of normal images (Eq. 6), and the mean and deviation of both scores on held-out
normal images. A position scores the squared error of the students' mean (Eq. 8) and the students' variance (Eq. 9),
both standardized and added (Eq. 10); several patch sizes are averaged (Eq. 11), and an image scores its maximum.

Paper: Uninformed Students: Student-Teacher Anomaly Detection with Discriminative Latent Embeddings, CVPR 2020,
    arXiv:1911.02357.
Reference: https://github.com/denguir/student-teacher-anomaly-detection (no official code)
Differences: descriptions may be less dense than pixels (`stride`), in the middle of as many pixels but for half a one;
    images are surrounded by zeros after they are normalized; every tenth training image is held out for the scales;
    students learn descriptions without an activation, and images are not flipped, as they are in the reference.
Results: experiments/recipes/uninformed_students.py; teachers come from experiments/distill_teacher.py.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxad.backbones import features, student
from jaxad.base import Batch, EmbedFn, Frozen, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.ops.gaussian import Moments, channels, channels_update, moments_init
from jaxad.ops.heatmap import upsample_blur
from jaxad.training.checks import above_zero, at_least_one, multiples_of, zero_or_more
from jaxad.training.gradient import Trained, begin, descend, mean_of_valid, torch_adam, zero_padding
from jaxad.training.holdout import held_out, learned_from


class Scale(NamedTuple):
    """A mean and a deviation for every channel."""

    mean: Float[Array, "c"]
    deviation: Float[Array, "c"]


class Measuring(NamedTuple):
    """The untrained students, and what the teacher gives for normal images so far; both by patch network."""

    students: PyTree
    moments: dict[str, Moments]


class Teaching(NamedTuple):
    """The students while they are trained, and the teachers' scales."""

    trained: Trained
    teacher: dict[str, Scale]


class Calibrating(NamedTuple):
    """The trained students, and the errors and variances of held-out images so far."""

    students: PyTree
    teacher: dict[str, Scale]
    moments: dict[str, Moments]


class Students(NamedTuple):
    """The trained students and all scales."""

    students: PyTree
    teacher: dict[str, Scale]
    scores: dict[str, Scale]
    """Of the regression error and the predictive variance."""


@functools.lru_cache
def described(backbones: tuple[str, ...], layer: str) -> EmbedFn:
    """The `embed`: the image, and what every teacher makes of it."""
    parts = [features(name, (layer,), image=True) for name in backbones]

    def embed(frozen: Frozen, image: Array) -> dict[str, Array]:
        found = {}
        for name, part, own in zip(backbones, parts, members(frozen), strict=True):
            maps = part(own, image)
            found |= {"image": maps["image"], name: maps[layer]}
        return found

    return embed


def members(frozen: Frozen) -> tuple[Frozen, ...]:
    """The weights of every teacher."""
    return frozen if isinstance(frozen, tuple) else (frozen,)


def uninformed_students(
    *,
    backbone: str | tuple[str, ...] = ("patch17", "patch33", "patch65"),
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
        backbone: The teachers, a patch network each; several are several scales, whose `frozen` is a tuple.
        image_size: (height, width) of the images, multiples of the stride; that of the heat map.
        num_students: Students of every teacher.
        stride: Pixels between the patches that are described: 1, 2, 4 or 8.
        epochs: Passes over the training images.
        train_batch_size: Images of a step.
        learning_rate: Of Adam.
        weight_decay: Of Adam, added to the gradient.

    Raises:
        ValueError: A hyper-parameter is out of its range, or a backbone is no patch network or given twice.
    """
    at_least_one(num_students=num_students, epochs=epochs, train_batch_size=train_batch_size)
    above_zero(learning_rate=learning_rate)
    zero_or_more(weight_decay=weight_decay)
    names = (backbone,) if isinstance(backbone, str) else tuple(backbone)
    if not names or not all(name.startswith("patch") for name in names):
        raise ValueError(
            "the backbones must be patch17, patch33 or patch65, whose weights experiments/distill_teacher.py makes, "
            f"got {', '.join(names) or 'none'}"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"the backbones must differ, got {', '.join(names)}")
    if stride not in (1, 2, 4, 8):
        raise ValueError(f"stride must be 1, 2, 4 or 8, got {stride}")
    multiples_of(stride, image_size=image_size)
    layer = f"stride{stride}"
    learners = {name: student(name, (layer,)) for name in names}
    optimizer = torch_adam(learning_rate, weight_decay)

    def descriptions(students: PyTree, frozen: Frozen, x: dict[str, Array], valid: Any) -> dict[str, Array]:
        """What every student makes of the images, s b h w c by patch network."""

        def of(name: str, own: Frozen) -> Array:
            one = lambda variables: learners[name].apply(variables, own, x["image"], valid)[0][layer]  # noqa: E731
            return jax.vmap(one)(students[name])

        return {name: of(name, own) for name, own in zip(names, members(frozen), strict=True)}

    def standardized(teacher: dict[str, Scale], x: dict[str, Array]) -> dict[str, Array]:
        return {name: (x[name] - teacher[name].mean) / teacher[name].deviation for name in names}

    def init(key: Key, frozen: Frozen, spec: PyTree) -> Measuring:
        del frozen
        keys = jax.random.split(key, (len(names), num_students))
        students = {name: jax.vmap(learners[name].init)(own) for name, own in zip(names, keys, strict=True)}
        return Measuring(students, {name: moments_init((spec[name].shape[-1], 1)) for name in names})

    def measure(key: Key, state: Measuring, frozen: Frozen, batch: Batch) -> tuple[Measuring, Metrics]:
        del key, frozen
        moments = {name: channels_update(state.moments[name], batch.x[name], batch.valid) for name in names}
        return state._replace(moments=moments), {}

    def to_teach(key: Key, state: Measuring, frozen: Frozen) -> Teaching:
        del key, frozen
        return Teaching(begin(optimizer, state.students), scales(state.moments))

    def scales(moments: dict[str, Moments]) -> dict[str, Scale]:
        return {name: Scale(*channels(moments[name])) for name in names}

    def train(key: Key, state: Teaching, frozen: Frozen, batch: Batch) -> tuple[Teaching, Metrics]:
        del key
        x = zero_padding(batch.x, batch.valid)
        wanted = standardized(state.teacher, x)

        def loss(students: PyTree) -> Float[Array, ""]:
            found = descriptions(students, frozen, x, batch.valid)
            errors = [((found[name] - wanted[name]) ** 2).sum(-1).mean((2, 3)).sum(0) for name in names]
            return mean_of_valid(sum(errors[1:], errors[0]), batch.valid)

        trained, metrics = descend(optimizer, state.trained, loss)
        share = jnp.asarray(len(names) * num_students, jnp.float32)
        return state._replace(trained=trained), {"loss": metrics["loss"] / share}

    def to_calibrate(key: Key, state: Teaching, frozen: Frozen) -> Calibrating:
        del key, frozen
        return Calibrating(state.trained.params, state.teacher, {name: moments_init((2, 1)) for name in names})

    def disagreement(state: Any, frozen: Frozen, x: dict[str, Array]) -> dict[str, Float[Array, "b h w 2"]]:
        """The regression error and the predictive variance of every position (Eq. 8 and 9)."""
        found = descriptions(state.students, frozen, x, jnp.ones(len(x["image"]), bool))
        wanted, both = standardized(state.teacher, x), {}
        for name in names:
            mean = found[name].mean(0)
            variance = ((found[name] - mean) ** 2).sum(-1).mean(0)
            both[name] = jnp.stack([((mean - wanted[name]) ** 2).sum(-1), variance], -1)
        return both

    def calibrate(key: Key, state: Calibrating, frozen: Frozen, batch: Batch) -> tuple[Calibrating, Metrics]:
        del key
        found = disagreement(state, frozen, batch.x)
        moments = {name: channels_update(state.moments[name], found[name], batch.valid) for name in names}
        return state._replace(moments=moments), {}

    def finish(key: Key, state: Calibrating, frozen: Frozen) -> Students:
        del key, frozen
        return Students(state.students, state.teacher, scales(state.moments))

    def score(state: Students, frozen: Frozen, x: dict[str, Array]) -> Scores:
        pixel = jnp.zeros(())
        for name, found in disagreement(state, frozen, x).items():
            own = state.scores[name]
            pixel = pixel + upsample_blur(((found - own.mean) / own.deviation).sum(-1), image_size, 0.0) / len(names)
        return Scores(pixel.max((1, 2)), pixel)

    stages = (
        Stage("measure", measure, to_teach, rows=learned_from),
        Stage(
            "train", train, to_calibrate, epochs=epochs, batch_size=train_batch_size, shuffle=True, rows=learned_from
        ),
        Stage("calibrate", calibrate, finish, rows=held_out),
    )
    return Method(described(names, layer), init, stages, score)
