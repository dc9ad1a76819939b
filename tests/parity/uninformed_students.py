"""Uninformed Students against an implementation on GitHub, with narrow networks of 17 and 33 px.

From github.com/denguir/student-teacher-anomaly-detection at fc279ef72ed3a0bc25fe99b621dd04f304da68e7 these were called,
in float64: `fdfe` of `AnomalyNet17` and `AnomalyNet33`, `student_loss` with Adam, `calibrate` and `get_score_map`; the
maps of both patch sizes were averaged. Hidden layers have fewer channels; a function that undoes the leaky ReLUs before
and after it replaces `decode`, since descriptors have no activation in jaxad. Images are normalized to -1..1.
"""

from typing import Any

import jax
import numpy as np

from jaxad.backbones import patchnet
from jaxad.methods.uninformed_students import Ensembles, Scale, uninformed_students
from tests.parity.golden import Golden, pixels
from tests.parity.steps import KEY, batch_of, follow, from_torch, gradient, shapes_of, to_torch, under

H, W, STUDENTS = 24, 32, 2
HALF = (127.5,) * 3
LAYOUTS = {
    17: patchnet.Layout(17, ((6, 6, False), (5, 8, False), (5, 8, False), (4, patchnet.OUT, False))),
    33: patchnet.Layout(33, ((5, 6, True), (5, 8, True), (2, 8, False), (4, patchnet.OUT, False))),
}
NETWORKS = {str(size): patchnet.make(str(size), layout, normalization=(HALF, HALF)) for size, layout in LAYOUTS.items()}


def name_of(path: str) -> list[str]:
    """A leaf of the parameters -> its tensor in the torch module of each student."""
    size, module, leaf = path.replace("kernel", "weight").split("/")
    return [f"student{size}.{i}.{module}.{leaf}" for i in range(STUDENTS)]


def teacher(size: str) -> Any:
    """The weights of the teacher of that patch size."""

    def tensor(path: str) -> str:
        return path.replace("kernel", "weight").replace("/", ".")

    shapes = jax.eval_shape(NETWORKS[size].init, KEY)["params"]
    params = from_torch(shapes, lambda path: f"teacher{size}.{tensor(path)}")
    return NETWORKS[size].fold(to_torch(params, tensor))


def ours(golden: Golden) -> dict[str, Any]:
    del golden
    method = uninformed_students(backbone=tuple(NETWORKS.values()), image_size=(H, W), num_students=STUDENTS)
    measure, train, calibrate = method.stages
    frozen = tuple(map(teacher, NETWORKS))
    embed = jax.jit(method.embed)
    normal, tested = (embed(frozen, pixels(name, 2, H, W, 3)) for name in ("normal", "tested"))
    moments, _ = jax.jit(measure.update)(KEY, shapes_of(measure, normal), frozen, batch_of(normal))
    scales = jax.jit(measure.finalize)(KEY, moments, frozen)
    first = {name: np.asarray(leaf[:1]) for name, leaf in normal.items()}
    training = shapes_of(train, first, scales, frozen)
    training = training._replace(model=Ensembles(from_torch(training.model.params, name_of), scales))
    (training,), losses = follow(train, training, [batch_of(first)], frozen)
    state = shapes_of(calibrate, normal, training.model, frozen)._replace(**training.model._asdict())
    state, _ = jax.jit(calibrate.update)(KEY, state, frozen, batch_of(normal))
    state = jax.jit(calibrate.finalize)(KEY, state, frozen)
    scores = jax.jit(method.score)(state, frozen, tested)

    def fields(quantity: str, scales: dict[str, Scale], part: Any = ...) -> dict[str, Any]:
        named = {quantity.format(size): scale._asdict() for size, scale in scales.items()}
        return {f"{name} {field}": v[part] for name, scale in named.items() for field, v in scale.items()}

    return {
        **fields("teacher/{}", scales),
        "loss": np.asarray(losses),
        **under("gradient", to_torch(gradient(training), name_of)),
        **under("parameters after 1 step", to_torch(training.model.params, name_of)),
        **fields("scores of normal images/{} err", state.scores, 0),
        **fields("scores of normal images/{} var", state.scores, 1),
        "heat map": scores.pixel,
        "score": scores.image,
    }
