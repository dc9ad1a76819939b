"""Learning: settings and normal images in, fitted models with thresholds out."""

import functools
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxad.backbones
from jaxad.base import Frozen, Method, MonotoneMethod, Scores, State
from jaxad.data import Dataset, Preprocess, open_data
from jaxad.driver import plan as planning
from jaxad.driver.embedding import EmbeddingCache
from jaxad.driver.execution import Execution
from jaxad.driver.fit import fit, fit_classes
from jaxad.driver.mesh import broadcast
from jaxad.driver.plan import Plan, estimate
from jaxad.driver.program import compile_seconds
from jaxad.driver.programs import class_state
from jaxad.driver.scoring import embed_all, score, score_classes
from jaxad.methods import factory
from jaxad.metrics import Threshold, conformal_threshold, cross_threshold, tail_threshold
from jaxad.metrics.guarantees import shortfall
from jaxad.settings import Settings

CURVE = 200
"""Points of a loss curve, at most."""
PHOTOGRAPHS = 1000
"""Photographs of an auxiliary folder that are used, at most."""


class Model(NamedTuple):
    """A fitted model."""

    image_size: tuple[int, int]
    """(height, width) of the preprocessed images."""
    state: State
    image_threshold: Threshold | None = None
    pixel_threshold: Threshold | None = None
    normal_level: float | None = None
    """The median pixel score of held-out normal images."""
    n_train: int = 0
    n_heldout: int = 0
    seconds: Mapping[str, float] = MappingProxyType({})
    """Of compiling, fitting and setting the threshold."""
    loss: Sequence[float] = ()
    """The loss over time, of at most `CURVE` points."""


class Sweep(NamedTuple):
    """A hyperparameter that a fitted state can still change, and its values."""

    name: str
    values: tuple[float | int, ...]


class Learned(NamedTuple):
    """What `learn` returns."""

    models: tuple[Model, ...]
    """One a member."""
    method: Method
    """What scores all models."""
    state: State
    """Of all models, with a leading axis; of a single one without."""
    classes_per_step: int | None
    """Classes in memory at the same time; None: all."""


def learn(
    members: Sequence[Settings],
    datasets: Sequence[Dataset],
    execution: Execution = Execution(),
    *,
    frozen: Frozen,
    auxiliary: Any = None,
    sweep: Sweep | None = None,
) -> Learned:
    """Fits several models in one program, and sets their thresholds. The fits of a cross-holdout are more of the same.

    Args:
        members: The settings of the models. They differ in their seeds at most. In a sweep, those with the first, the
            second, ... value of the hyperparameter follow each other; one fit serves them all.
        datasets: The normal images for each, of one size.
        execution: How; `classes_per_step` None means as many as fit into memory. The batch size is that of the
            settings.
        frozen: Of `load_frozen`.
        auxiliary: Of `load_photographs`.
        sweep: A hyperparameter and its values.

    Raises:
        ValueError: There is not enough memory (says how to need less), or the hyperparameter of the sweep is not one
            that a fitted model can change.
    """
    values = sweep.values if sweep else (0,)
    first = members[int(np.argmax(values)) if sweep else 0]
    methods = [member.build(data.image_size) for member, data in zip(members, datasets, strict=True)]
    method = first.build(datasets[0].image_size)
    if sweep and sweep.name not in dict(method.vary):
        names = ", ".join(name for name, _ in method.vary) or "nothing"
        raise ValueError(f"{first.method} up to {max(values)} can sweep {names} at once, got {sweep.name}")
    fits, once = _fits(members, datasets, len(values)), slice(None, None, len(values))
    several, train, held_out = len(fits) > 1, [fit.train for fit in fits], [fit.held_out for fit in fits]
    execution = configured(execution, first)
    started = compile_seconds()
    if execution.progress:
        execution.progress("compile", 0, 0)
    scoring = any(held_out) and not sweep
    execution = _fitting_into_memory(first, method, frozen, auxiliary, train[once], execution, scoring)
    began, estimated = time.perf_counter(), compile_seconds()
    if first.cross_holdout:
        embed_all(method.embed, frozen, datasets[once], execution)
    compiled = compile_seconds() - started
    embed_seconds = time.perf_counter() - began - (compile_seconds() - estimated)
    keys = jnp.stack([jax.random.key(members[fit.member].seed) for fit in fits])
    if several:
        fitted = fit_classes(method, frozen, train[once], keys[once], execution, auxiliary=auxiliary)
        state = _swept(method, fitted.state, sweep) if sweep else fitted.state
    else:
        fitted = fit(method, frozen, train[0], keys[0], execution, auxiliary=auxiliary)
        state = fitted.state
    started = time.perf_counter()
    scored = _held_out_scores(method, state, frozen, held_out, execution)
    threshold_seconds = time.perf_counter() - started
    losses, total = fitted.metrics.get("loss", np.empty(0)), sum(map(len, train))
    models, deployed = [], [i for i, fit in enumerate(fits) if fit.fold == 0]
    for number, i in enumerate(deployed):
        data, own = train[i], [j for j, fit in enumerate(fits) if fit.member == number]
        share = sum(len(train[j]) for j in own) / total
        run_seconds = embed_seconds + fitted.run_seconds
        seconds = {"compile": (compiled + fitted.compile_seconds) * share, "fit": run_seconds * share}
        model = Model(
            data.image_size,
            class_state(methods[number], frozen, state, i, data) if several else state,
            n_train=len(data),
            n_heldout=sum(len(held_out[j]) for j in own),
            seconds=seconds | ({"threshold": threshold_seconds * share} if any(scored[j] for j in own) else {}),
            loss=_curve(losses[i // len(values)] if several and losses.size else losses),
        )
        groups = [f"{fits[j].fold} {group}" for j in own for group in held_out[j].groups]
        fold = np.repeat([fits[j].fold for j in own], [len(held_out[j]) for j in own])
        summaries = [summary for j in own for summary in scored[j]]
        models.append(model._replace(**_thresholds(summaries, fold, groups, members[number], methods[number])))
    if len(members) == 1:
        state = models[0].state
    elif len(deployed) < len(fits):
        state = jax.tree.map(lambda leaf: leaf[np.asarray(deployed)], state)
    return Learned(tuple(models), method, state, execution.classes_per_step)


def plan(
    members: Sequence[Settings],
    datasets: Sequence[Dataset],
    execution: Execution = Execution(),
    *,
    frozen: Frozen,
    auxiliary: Any = None,
) -> Plan:
    """The memory that `learn` needs with these arguments; nothing is fitted."""
    fits = _fits(members, datasets)
    method, scoring = members[0].build(datasets[0].image_size), any(len(fit.held_out) for fit in fits)
    execution = configured(execution, members[0])
    return estimate(method, frozen, [fit.train for fit in fits], execution, auxiliary=auxiliary, scoring=scoring)


def shortage(settings: Settings, plan: Plan) -> str | None:
    """Why a fit does not fit into memory, and what would help; None if it fits."""
    lacking = planning.shortage(plan, factory(settings.method), settings.hyperparameters, settings.precision)
    return lacking and lacking + (", a smaller --cross-holdout" if settings.cross_holdout else "")


def split(settings: Settings, data: Dataset) -> tuple[Dataset, Dataset]:
    """The images to learn from, and those held out: a share of the groups, drawn at random, each as a whole.

    The share is one of groups and not of images: which groups are drawn must not depend on their sizes, or those held
    out would not be exchangeable with new ones.
    """
    rank = _group_ranks(settings, data)
    n = 1 + int(rank.max())
    count = min(n - 1, max(1, round(settings.holdout * n))) if settings.holdout else 0
    return data.subset(rank >= count), data.subset(rank < count)


def folds(settings: Settings, data: Dataset) -> list[tuple[Dataset, Dataset]]:
    """The images to learn from, and those held out, of each fold of a cross-holdout: whole groups, as in `split`."""
    rank = _group_ranks(settings, data)
    count = min(settings.cross_holdout or 0, 1 + int(rank.max()))
    parts = range(count) if count > 1 else ()
    return [(data.subset(rank % count != part), data.subset(rank % count == part)) for part in parts]


def _group_ranks(settings: Settings, data: Dataset) -> np.ndarray:
    """The place of each image's group in a random order, counted from 0."""
    names = {group: i for i, group in enumerate(dict.fromkeys(data.groups))}
    if (settings.holdout or settings.cross_holdout) and len(names) == 1 < len(data):
        raise ValueError(
            f"holding out whole groups needs two or more, got {data.groups[0]!r} for all {len(data)} images of "
            f"{data.category}: tell the groups apart, or set holdout to 0"
        )
    order = np.random.default_rng(settings.seed).permutation(len(names))
    return np.argsort(order)[[names[group] for group in data.groups]]


def leakage(settings: Settings, data: Dataset) -> str:
    """Why the threshold may miss its rate on new parts: the hold-out seems to split shots of one part; else empty."""
    signs = data.repeats if settings.holdout or settings.cross_holdout else ""
    return signs and (
        f"{signs}: if these show one part, the threshold will not keep its false-alarm rate on new parts; "
        "name the parts with --group-by REGEX (group_by) or a group column"
    )


class _Fit(NamedTuple):
    """One of the fits of `learn`."""

    member: int
    """The number of the model that it is or belongs to."""
    fold: int
    """0 if it is the model; 1, 2, ... if it only scores the images that a cross-holdout holds out of it."""
    train: Dataset
    held_out: Dataset


def _fits(members: Sequence[Settings], datasets: Sequence[Dataset], values: int = 1) -> list[_Fit]:
    """All fits; the values of a sweep side by side."""
    parts = [[split(member, data), *folds(member, data)] for member, data in zip(members, datasets, strict=True)]
    return [
        _Fit(first + value, fold, *parts[first + value][fold])
        for first in range(0, len(members), values)
        for fold in range(len(parts[first]))
        for value in range(values)
    ]


def configured(execution: Execution, settings: Settings) -> Execution:
    """An execution with the batch size and the cache of the settings."""
    shared = settings.cross_holdout is not None
    cache = EmbeddingCache(settings.storage, shared=shared) if execution.cache is None else execution.cache
    return execution._replace(batch_size=settings.batch_size, cache=cache)


def load_frozen(settings: Settings) -> Frozen:
    """The pretrained weights; a tuple of several backbones', None where the method has none."""
    files = zip(settings.backbone, settings.weights, strict=True)
    return _one_or_all([jaxad.backbones.load(name, file, settings.precision) for name, file in files])


def abstract_frozen(settings: Settings) -> Frozen:
    """The shapes and types of the pretrained weights, which need not be on this machine."""
    shapes = []
    for name in settings.backbone:
        variables = jax.eval_shape(jaxad.backbones.backbone(name).init, jax.eval_shape(jax.random.key, 0))
        cast = functools.partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, settings.precision))
        shapes.append(variables | {"params": cast(variables["params"])})
    return _one_or_all(shapes)


def _one_or_all(weights: list[Any]) -> Any:
    return None if not weights else weights[0] if len(weights) == 1 else tuple(weights)


def check_auxiliary(settings: Settings, method: Method) -> None:
    """Raises ValueError where the method needs auxiliary photographs and the settings name none."""
    if method.auxiliary and method.auxiliary.needed and settings.auxiliary is None:
        raise ValueError(
            f"{settings.method} learns from photographs of other things too: set auxiliary to a folder of them, or "
            "penalty to False"
        )


def load_photographs(settings: Settings, method: Method, image_size: tuple[int, int]) -> jax.Array | None:
    """The auxiliary photographs at the size of the images, of many some, evenly spread; None where none are used.

    Raises:
        ValueError: The method needs some, and the settings name none.
    """
    check_auxiliary(settings, method)
    if method.auxiliary is None or settings.auxiliary is None:
        return None
    h, w = image_size
    preprocess = Preprocess((2 * h, 2 * w), (h, w)) if method.auxiliary.inner_half else Preprocess((h, w))
    (photographs,) = open_data(settings.auxiliary, preprocess=preprocess, layout="flat").values()
    data = photographs.train
    assert data is not None
    return jnp.asarray(data.images(np.unique(np.linspace(0, len(data) - 1, PHOTOGRAPHS).astype(int))))


class _Summary(NamedTuple):
    """What thresholds are made from; one entry an image, none where there is no heat map."""

    image: np.ndarray
    largest: np.ndarray
    median: np.ndarray


def _summary(scores: Scores, ignored: np.ndarray | None) -> _Summary:
    if scores.pixel is None:
        return _Summary(np.asarray(scores.image), np.empty(0), np.empty(0))
    pixel = np.asarray(scores.pixel)
    counted = pixel if ignored is None else np.where(ignored, np.nan, pixel)
    return _Summary(np.asarray(scores.image), pixel.max((1, 2)), np.nanmedian(counted, (1, 2)))


def _held_out_scores(
    method: Method, state: State, frozen: Frozen, held_out: Sequence[Dataset], execution: Execution
) -> list[list[_Summary]]:
    """The scores of the images that each model was not fitted on."""
    progress = execution.progress
    if progress:
        execution = execution._replace(progress=lambda _, done, total: progress("threshold", done, total))
    if len(held_out) > 1:
        stream = score_classes(method, state, frozen, held_out, execution, whole_batches=True)
    else:
        stream = ((0, *part) for part in score(method, state, frozen, held_out[0], execution, whole_batches=True))
    summaries: list[list[_Summary]] = [[] for _ in held_out]
    for i, rows, scores in stream:
        summaries[i].append(_summary(scores, held_out[i].ignored(rows)))
    return summaries


def _thresholds(summaries: Sequence[_Summary], *options: Any) -> dict[str, Any]:
    """Fields of a `Model`, from the scores of held-out images if there are any."""
    if not summaries:
        return {}
    image, largest, median = (np.concatenate(column) for column in zip(*summaries, strict=True))
    fields: dict[str, Any] = {"image_threshold": _threshold(image, *options)}
    if largest.size:
        fields |= {"pixel_threshold": _threshold(largest, *options), "normal_level": float(np.median(median))}
    return fields


def _threshold(
    scores: np.ndarray, fold: np.ndarray, groups: Sequence[str], settings: Settings, method: Method
) -> Threshold:
    if settings.cross_holdout is None:
        threshold = conformal_threshold(scores, settings.fpr, groups)
    else:
        monotone = isinstance(method, MonotoneMethod)
        threshold = cross_threshold(scores, settings.fpr, fold, groups, monotone=monotone)
    if settings.tail == "none" or shortfall(threshold) is None:
        return threshold
    try:
        return tail_threshold(scores, settings.fpr, groups)
    except ValueError:  # there are too few
        return threshold


def _curve(losses: np.ndarray) -> list[float]:
    """The losses of all steps, averaged over neighboring steps where there are more than `CURVE`."""
    finite = losses[np.isfinite(losses)]
    return [float(part.mean()) for part in np.array_split(finite, min(len(finite), CURVE))] if len(finite) else []


def _fitting_into_memory(
    settings: Settings,
    method: Method,
    frozen: Frozen,
    auxiliary: Any,
    datasets: Sequence[Dataset],
    execution: Execution,
    scoring: bool,
) -> Execution:
    """The execution with as many classes at a time as fit into memory, where it does not say; refuses what does not."""
    asked = execution.classes_per_step
    while True:
        lacking = shortage(
            settings, estimate(method, frozen, datasets, execution, auxiliary=auxiliary, scoring=scoring)
        )
        if not broadcast(lacking is not None):
            return execution
        classes = execution.classes_per_step or len(datasets)
        if asked is not None or classes == 1:
            raise ValueError(lacking or "fitting needs more memory than the first process has")
        execution = execution._replace(classes_per_step=-(-classes // 2))


def _swept(method: Method, states: State, sweep: Sweep) -> State:
    """The states of all classes with every value of a hyperparameter, the values of a class side by side."""
    change, values = dict(method.vary)[sweep.name], jnp.asarray(sweep.values)
    varied = jax.vmap(jax.vmap(change, (None, 0)), (0, None))(states, values)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), varied)
