"""The facade: any method, a folder of photographs in, scores and heat maps out."""

import copy
import inspect
import itertools
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float

import jaxad.backbones
from jaxad import artifact, files
from jaxad.base import Frozen, Method, Scores, State
from jaxad.data import Dataset, Preprocess, open_data
from jaxad.data.folders import recognize
from jaxad.driver.embedding import EmbeddingCache, Storage
from jaxad.driver.fit import Progress, abstract_state, class_state, fit, fit_classes, score, score_classes
from jaxad.driver.mesh import agreed
from jaxad.driver.plan import Plan, estimate, shortage
from jaxad.driver.program import compile_seconds
from jaxad.methods import factory
from jaxad.metrics import Threshold, conformal_threshold
from jaxad.metrics import threshold as thresholds

CURVE = 200
"""Points of a curve of losses at most."""
AUXILIARY = 1000
"""Photographs of an auxiliary folder that are used, at most."""
EMBEDDED = "pdn_small"
"""The backbone that comes with the package and needs no download."""


class Prediction(NamedTuple):
    """The result of `Detector.predict`, one entry an image, in order."""

    paths: tuple[str, ...]
    pred_score: Float[np.ndarray, "n"]
    """Anomaly scores: higher is more anomalous; not normalized."""
    pred_label: Bool[np.ndarray, "n"] | None
    """Whether the score is above the image threshold; None where there is no threshold."""
    anomaly_map: Float[np.ndarray, "n h w"] | None
    """Heat maps on the preprocessed image; None for methods without."""
    pred_mask: Bool[np.ndarray, "n h w"] | None
    """Where the heat map is above the pixel threshold."""


class Detector:
    """Learns from normal images, then scores new ones; the same class for every method.

    Args:
        method: A name in `jaxad.methods.METHODS`.
        backbone: A name in `jaxad weights list`, or several for an ensemble; None is the one that the weights are named
            after, or without weights the small one that comes with the package, which needs no download. The published
            numbers belong to larger ones.
        weights: A safetensors file of the backbone (several for several); None: the cache of `jaxad weights fetch`.
        auxiliary: A folder of photographs of other things, for methods that learn from such: efficientad needs them,
            draem, glass and memseg draw anomalies with them, and otherwise with made-up textures.
        image_size: Height and width that images are resized to; one number for both, None to leave them as they are.
        center_crop: Height and width cut out of the middle afterwards.
        holdout: Share of the normal images kept from learning, to set the threshold by; 0 uses all images and gives no
            threshold.
        fpr: Wanted false-positive rate of the threshold.
        precision: What the backbone computes in; "bfloat16" is faster on GPUs and TPUs and halves its memory.
        cache: Where embedded images are kept while a method sees them several times: in the host's memory, or on the
            devices, which then wait for no copy.
        cache_dtype: What they are kept in; "bfloat16" rounds them to half their size.
        seed: Seed of everything random.
        batch_size: Images at a time.
        hyperparameters: Those of the method's factory.

    Raises:
        ValueError: An unknown method, backbone or hyper-parameter, or a value out of its range.
    """

    def __init__(
        self,
        method: str = "patchcore",
        *,
        backbone: str | Sequence[str] | None = None,
        weights: str | Path | Sequence[str | Path | None] | None = None,
        auxiliary: str | Path | None = None,
        image_size: int | tuple[int, int] | None = 224,
        center_crop: int | tuple[int, int] | None = None,
        holdout: float = 0.2,
        fpr: float = 0.05,
        precision: Literal["float32", "bfloat16"] = "float32",
        cache: Literal["host", "device"] = "host",
        cache_dtype: Literal["float32", "bfloat16"] = "float32",
        seed: int = 0,
        batch_size: int = 16,
        **hyperparameters: Any,
    ) -> None:
        if not 0 <= holdout < 1:
            raise ValueError(f"holdout must be in [0, 1), got {holdout}")
        if not 0 < fpr < 1:
            raise ValueError(f"fpr must be in (0, 1), got {fpr}")
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f'precision must be "float32" or "bfloat16", got "{precision}"')
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        known = set(inspect.signature(factory(method)).parameters) - {"backbone", "image_size"}
        unknown = sorted(set(hyperparameters) - known)
        if unknown:
            raise ValueError(f"{method} has the hyper-parameters {', '.join(sorted(known))}; got {', '.join(unknown)}")
        self.method_name, self.hyperparameters = method, hyperparameters
        given = (weights,) if isinstance(weights, (str, Path)) else tuple(weights or ())
        names = (backbone,) if isinstance(backbone, str) else tuple(backbone or ())
        names = names or tuple(EMBEDDED if one is None else jaxad.backbones.of_file(one) for one in given or (None,))
        files = given or (None,) * len(names)
        if len(files) != len(names):
            raise ValueError(f"every backbone needs its weights: got {len(names)} backbones and {len(files)} files")
        self.weights = tuple(None if file is None else Path(file) for file in files)
        self.backbones = tuple(map(jaxad.backbones.resolve, names, self.weights))
        self.auxiliary = None if auxiliary is None else Path(auxiliary)
        self.preprocess = Preprocess(_pair(image_size), _pair(center_crop))
        self.preprocess.check()
        self.holdout, self.fpr, self.precision = holdout, fpr, precision
        self.storage = Storage(cache, cache_dtype)
        self.storage.check()
        self.seed, self.batch_size = seed, batch_size
        self.frozen: Frozen = None
        self.state: State = None
        self.image_threshold: Threshold | None = None
        self.pixel_threshold: Threshold | None = None
        self.normal_level: float | None = None
        self.n_train = self.n_heldout = 0
        self.variant = ""
        self.seconds: dict[str, float] = {}
        self.loss: list[float] = []
        self._built: tuple[tuple[int, int], Method] | None = None
        self._build(self.preprocess.output_size(self.preprocess.resize) if self.preprocess.resize else (224, 224))

    @property
    def method(self) -> Method:
        """The pure functions, for images of the size last seen."""
        assert self._built is not None
        return self._built[1]

    def fit(
        self,
        source: Any,
        *,
        category: str | None = None,
        mask_threshold: int = 0,
        mesh: Mesh | None = None,
        cache: EmbeddingCache | None = None,
        checkpoint_dir: str | Path | None = None,
        progress: Progress | None = None,
    ) -> "Detector":
        """Learns from the normal images of a source.

        Args:
            source: What `jaxad.data.open_data` opens (a folder, a CSV, "tfds:NAME", "demo", arrays), or a `Dataset`.
            category: Which product class, where the source has several.
            mask_threshold: A mask pixel counts where it is above.
            mesh: Of `jaxad.make_mesh`, to spread one class over its axis "data"; None: one device.
            cache: Embedded images shared between detectors; they must share `frozen` too.
            checkpoint_dir: Where progress is kept so that a killed run resumes.
            progress: Called with what is done, the images done and the images in all.

        Returns:
            The detector itself.
        """
        data = source if isinstance(source, Dataset) else self._one(source, category, mask_threshold, "train")
        fit_together([self], [data], mesh=mesh, cache=cache, checkpoint_dir=checkpoint_dir, progress=progress)
        return self

    def score(
        self,
        data: Dataset,
        *,
        mesh: Mesh | None = None,
        cache: EmbeddingCache | None = None,
        progress: Progress | None = None,
    ) -> Iterator[tuple[np.ndarray, Scores]]:
        """Scores batch by batch: yields (indices, `Scores`); memory does not grow with the number of images.

        Raises:
            ValueError: The detector is not fitted, or the images are of another size than those it was fitted on.
        """
        if self.state is None or self._built is None:
            raise ValueError("a detector must be fitted before it scores: call fit, or jaxad.load a saved one")
        if data.image_size != self._built[0]:
            raise ValueError(
                f"images must be {self._built[0]} (height, width) as in fit, got {data.image_size}: set image_size"
            )
        options: dict[str, Any] = {
            "batch_size": self.batch_size,
            "mesh": mesh,
            "cache": cache,
            "progress": progress,
        }
        return score(self._built[1], self.state, self.load_frozen(), data, **options)

    def color_limits(self) -> tuple[float, float] | None:
        """The pixel scores at which the colors of heat maps begin and end, the same for every image.

        They begin at the median pixel of held-out normal images and reach the pixel threshold halfway.

        Returns:
            None where there were no held-out images or the method gives no heat maps.
        """
        if self.normal_level is None or self.pixel_threshold is None:
            return None
        return self.normal_level, self.normal_level + 2 * max(0.0, self.pixel_threshold.value - self.normal_level)

    def predict(self, source: Any, *, category: str | None = None, progress: Progress | None = None) -> Prediction:
        """Scores images and compares with the thresholds.

        Args:
            source: A path, a list of paths, a folder, an array (h w, h w c or n h w c), or a `Dataset`. Of a folder in
                a layout with a test split, the test images.
            category: Which product class, where the source has several.
            progress: As for `fit`.
        """
        data = source if isinstance(source, Dataset) else self._one(source, category, 0, "test")
        parts = [scores for _, scores in self.score(data, progress=progress)]
        image = np.concatenate([s.image for s in parts])
        maps = [s.pixel for s in parts if s.pixel is not None]
        pixel = np.concatenate(maps) if maps else None
        label = None if self.image_threshold is None else image > self.image_threshold.value
        mask = None if pixel is None or self.pixel_threshold is None else pixel > self.pixel_threshold.value
        return Prediction(data.paths, image, label, pixel, mask)

    def save(self, directory: str | Path, state: State = None) -> None:
        """Writes model.safetensors, model.json and threshold.json; pretrained weights are named, not copied.

        Args:
            directory: Created where missing.
            state: `self.state` in the memory of this process, where it is spread over several.
        """
        if self.state is None or self._built is None:
            raise ValueError("a detector must be fitted before it is saved: call fit")
        description = self.recipe() | {
            "backbones": self.sources(),
            "image_size": self._built[0],
            "n_train": self.n_train,
            "normal_level": self.normal_level,
        }
        artifact.save_state(directory, self.state if state is None else state)
        both = thresholds.Thresholds(self.image_threshold, self.pixel_threshold)
        files.write_json(Path(directory) / "threshold.json", thresholds.pair_to_json(both))
        artifact.save_description(directory, description)

    def recipe(self) -> dict[str, Any]:
        """All that was asked for, as JSON values."""
        return {
            "method": self.method_name,
            "hyperparameters": self.hyperparameters,
            "auxiliary": None if self.auxiliary is None else str(self.auxiliary.absolute()),
            "preprocess": self.preprocess._asdict(),
            "holdout": self.holdout,
            "fpr": self.fpr,
            "precision": self.precision,
            "cache_dtype": self.storage.dtype,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }

    def sources(self) -> list[dict[str, str]]:
        """The name, file and sha256 of each backbone's weights."""
        files = map(jaxad.backbones.source, self.backbones, self.weights)
        return [
            {"name": name, "path": str(Path(file["path"]).absolute()), "sha256": file["sha256"]}
            for name, file in zip(self.backbones, files, strict=True)
        ]

    def load_frozen(self, learning: bool = False) -> Frozen:
        """The pretrained weights, read once; assign `frozen` to share them between detectors.

        Args:
            learning: With the auxiliary photographs, if the method learns from such.

        Raises:
            ValueError: There are no such photographs.
        """
        if self.frozen is None:
            files = zip(self.backbones, self.weights, strict=True)
            loaded = [jaxad.backbones.load(name, file, self.precision) for name, file in files]
            self.frozen = loaded[0] if len(loaded) == 1 else tuple(loaded)
        if learning and (self.method.auxiliary == "needed" or (self.method.auxiliary != "none" and self.auxiliary)):
            assert self._built is not None
            given = self.frozen.get("auxiliary")
            if given is None or given.shape[1:3] != self._built[0]:
                self.frozen = self.frozen | {"auxiliary": self._photographs()}
        return self.frozen

    def varied(self, name: str, value: Any) -> "Detector":
        """The same with another value of a hyper-parameter, not fitted."""
        own = copy.copy(self)
        own.hyperparameters, own.variant = self.hyperparameters | {name: value}, f"{name}={value}"
        own._built = None
        own._build(self._built[0] if self._built else (224, 224))
        return own

    def frozen_shapes(self) -> Frozen:
        """The pretrained weights, or where they are not on this machine their shapes, which suffice for an estimate."""
        try:
            return self.load_frozen()
        except FileNotFoundError:
            if any(self.weights):
                raise
        shapes = []
        for name in self.backbones:
            one = jax.eval_shape(jaxad.backbones.backbone(name).init, jax.eval_shape(jax.random.key, 0))
            cast = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, self.precision), one["params"])
            shapes.append(one | {"params": cast})
        return shapes[0] if len(shapes) == 1 else tuple(shapes)

    def shortage(self, plan: Plan) -> str | None:
        """What is missing for a fit that takes so much memory, and what would help; None if it fits."""
        return shortage(plan, factory(self.method_name), self.hyperparameters, self.precision)

    def _split(self, data: Dataset) -> tuple[Dataset, Dataset]:
        """The images to learn from, and those held out."""
        held_out = min(len(data) - 1, max(1, round(self.holdout * len(data)))) if self.holdout else 0
        if not held_out:
            return data, data.subset([])
        order = np.random.default_rng(self.seed).permutation(len(data))
        return data.subset(np.sort(order[held_out:])), data.subset(np.sort(order[:held_out]))

    def _set_thresholds(self, parts: Sequence["_Normal"]) -> None:
        """From held-out images, if there are any."""
        self.image_threshold = self.pixel_threshold = self.normal_level = None
        if not parts:
            return
        image, highest, median = (np.concatenate(column) for column in zip(*parts, strict=True))
        self.image_threshold = conformal_threshold(image, self.fpr)
        if highest.size:
            self.pixel_threshold = conformal_threshold(highest, self.fpr)
            self.normal_level = float(np.median(median))

    def _build(self, image_size: tuple[int, int]) -> Method:
        """The method for images of that size."""
        if self._built is None or self._built[0] != image_size:
            make = factory(self.method_name)
            given = {
                "backbone": self.backbones[0] if len(self.backbones) == 1 else self.backbones,
                "image_size": image_size,
            }
            accepted = {k: v for k, v in given.items() if k in inspect.signature(make).parameters}
            self._built = image_size, make(**accepted, **self.hyperparameters)
        return self._built[1]

    def check_auxiliary(self) -> None:
        """Raises a ValueError where the method needs auxiliary photographs and none are given."""
        if self.method.auxiliary == "needed" and self.auxiliary is None:
            raise ValueError(
                f"{self.method_name} learns from photographs of other things too: give auxiliary, a folder of them, or "
                "set penalty to False"
            )

    def _photographs(self) -> jax.Array:
        """The auxiliary images at the size of the others; of many some, evenly spread.

        Textures are whole; photographs that a method cannot do without are the inner halves, as EfficientAD has them.
        """
        self.check_auxiliary()
        assert self._built is not None and self.auxiliary is not None
        (h, w), _ = self._built
        halves = self.method.auxiliary == "needed"
        preprocess = Preprocess((2 * h, 2 * w), (h, w)) if halves else Preprocess((h, w))
        (split,) = open_data(self.auxiliary, preprocess=preprocess, layout="flat").values()
        data = split.train
        assert data is not None
        return jax.numpy.asarray(data.images(np.unique(np.linspace(0, len(data) - 1, AUXILIARY).astype(int))))

    def _one(self, source: Any, category: str | None, mask_threshold: int, split: str) -> Dataset:
        """The only category of a source, or the one asked for."""
        if isinstance(source, np.ndarray) and (
            source.ndim == 2 or (source.ndim == 3 and source.shape[-1] in (1, 3, 4))
        ):
            source = source[None]
        plain = isinstance(source, (str, Path)) and Path(source).is_dir() and recognize(Path(source)) == "flat"
        layout = "flat" if plain and split == "test" else "auto"
        opened = open_data(
            source, category=category, preprocess=self.preprocess, mask_threshold=mask_threshold, layout=layout
        )
        if len(opened) > 1:
            raise ValueError(f"one category at a time: choose category from {', '.join(opened)}")
        only = next(iter(opened.values()))
        return only.train if split == "train" or only.test is None else only.test


class Together(NamedTuple):
    """What `fit_together` returns."""

    method: Method
    """What scores all detectors."""
    state: State
    """Of several detectors with the leading axis that `jaxad.fit.score_classes` wants."""
    classes_per_step: int | None
    """Classes at a time; None: all."""


class Sweep(NamedTuple):
    """A hyper-parameter and its values."""

    name: str
    values: tuple[float | int, ...]


class _Normal(NamedTuple):
    """What thresholds are made of; one entry an image, none where there is no heat map."""

    image: np.ndarray
    highest: np.ndarray
    median: np.ndarray


def _normal(scores: Scores) -> _Normal:
    if scores.pixel is None:
        return _Normal(np.asarray(scores.image), np.empty(0), np.empty(0))
    pixel = np.asarray(scores.pixel)
    return _Normal(np.asarray(scores.image), pixel.max((1, 2)), np.median(pixel, (1, 2)))


def fit_together(
    detectors: Sequence[Detector],
    datasets: Sequence[Dataset],
    *,
    mesh: Mesh | None = None,
    classes_per_step: int | None = None,
    cache: EmbeddingCache | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    progress: Progress | None = None,
    sweep: Sweep | None = None,
) -> Together:
    """Fits several detectors, which differ in their seeds at most, in one program, and sets their thresholds.

    Args:
        detectors: Fitted in place, each as if on its own. In a sweep, those with the first, the second, ... value of
            the hyper-parameter follow each other; one fit serves them all.
        datasets: The normal images for each, of one size.
        mesh: As for `jaxad.fit.fit_classes`, like the rest.
        classes_per_step: So many at a time; None: as many as fit into memory.
        cache: Embedded images shared with other calls.
        checkpoint_dir: Where progress is kept so that a killed run resumes.
        checkpoint_seconds: Least time between two checkpoints.
        progress: Called with what is done, the images done and the images in all.
        sweep: A hyper-parameter and its values.

    Raises:
        ValueError: There is not enough memory (says how to need less), or the hyper-parameter of the sweep is not one
            that a fitted model can change.
    """
    values = sweep.values if sweep else (0,)
    first, several = detectors[int(np.argmax(values)) if sweep else 0], len(detectors) > 1
    methods = [detector._build(data.image_size) for detector, data in zip(detectors, datasets, strict=True)]
    method, frozen = first.method, first.load_frozen(learning=True)
    if sweep and sweep.name not in dict(method.vary):
        can = ", ".join(name for name, _ in method.vary) or "nothing"
        raise ValueError(f"{first.method_name} up to {max(values)} can sweep {can} at once, got {sweep.name}")
    parts = [detector._split(data) for detector, data in zip(detectors, datasets, strict=True)]
    chosen, held = [part[0] for part in parts], [part[1] for part in parts]
    compiled = compile_seconds()
    cache = EmbeddingCache(first.storage, shared=False) if cache is None else cache
    if progress:
        progress("compile", 0, 0)
    once = slice(None, None, len(values))
    classes_per_step = _fitting(first, chosen[once] if several else chosen[0], mesh, classes_per_step, cache, any(held))
    compiled = compile_seconds() - compiled
    keys = jax.numpy.stack([jax.random.key(detector.seed) for detector in detectors])
    options: dict[str, Any] = dict(mesh=mesh, batch_size=first.batch_size, cache=cache, progress=progress)
    steps: dict[str, Any] = dict(classes_per_step=classes_per_step) if several else {}
    kept: dict[str, Any] = dict(checkpoint_dir=checkpoint_dir, checkpoint_seconds=checkpoint_seconds)
    if several:
        learned = fit_classes(method, frozen, chosen[once], keys[once], **options, **steps, **kept)
        if sweep:
            learned = learned._replace(state=_swept(method, learned.state, sweep))
    else:
        learned = fit(method, frozen, chosen[0], keys[0], **options, **kept)
    started = time.perf_counter()
    if progress:
        options["progress"] = lambda _, done, total: progress("threshold", done, total)
    if several:
        stream = score_classes(method, learned.state, frozen, held, **options, **steps)
    else:
        stream = ((0, *part) for part in score(method, learned.state, frozen, held[0], **options))
    found: list[list[_Normal]] = [[] for _ in detectors]
    for i, _, scores in stream:
        found[i].append(_normal(scores))
    seconds = time.perf_counter() - started
    total = sum(map(len, chosen))
    for i, detector in enumerate(detectors):
        detector.frozen = frozen
        detector.state = class_state(methods[i], frozen, learned.state, i, chosen[i]) if several else learned.state
        detector.n_train, detector.n_heldout = len(chosen[i]), len(held[i])
        share = len(chosen[i]) / total
        detector.seconds = {"compile": (compiled + learned.compile_seconds) * share, "fit": learned.run_seconds * share}
        losses = learned.metrics.get("loss", np.empty(0))
        detector.loss = _curve(losses[i // len(values)] if several and losses.size else losses)
        detector._set_thresholds(found[i])
        if found[i]:
            detector.seconds["threshold"] = seconds * share
    return Together(method, learned.state, classes_per_step)


def _curve(losses: np.ndarray) -> list[float]:
    """The losses of all steps, those of several steps averaged where there are more than `CURVE`."""
    finite = losses[np.isfinite(losses)]
    return [float(part.mean()) for part in np.array_split(finite, min(len(finite), CURVE))] if len(finite) else []


def _fitting(
    detector: Detector,
    data: Dataset | Sequence[Dataset],
    mesh: Mesh | None,
    classes_per_step: int | None,
    cache: EmbeddingCache | None,
    scoring: bool,
) -> int | None:
    """How many classes at a time fit into memory, where that is not given; refuses what does not fit."""
    most = 1 if isinstance(data, Dataset) else len(data)
    together = classes_per_step
    while True:
        options: dict[str, Any] = dict(classes_per_step=together, batch_size=detector.batch_size, cache=cache)
        plan = estimate(detector.method, detector.load_frozen(), data, mesh=mesh, scoring=scoring, **options)
        lacking = detector.shortage(plan)
        if not agreed(lacking is not None):
            return together
        fewer = -(-(together or most) // 2)
        if classes_per_step is not None or fewer >= (together or most):
            raise ValueError(lacking or "fitting needs more memory than the first process has")
        together = fewer


def _swept(method: Method, states: State, sweep: Sweep) -> State:
    """The states of all classes with every value of a hyper-parameter, the values of a class side by side."""
    change, values = dict(method.vary)[sweep.name], jax.numpy.asarray(sweep.values)
    both = jax.vmap(jax.vmap(change, (None, 0)), (0, None))(states, values)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), both)


def plan_together(
    detectors: Sequence[Detector],
    datasets: Sequence[Dataset],
    *,
    mesh: Mesh | None = None,
    classes_per_step: int | None = None,
    cache: EmbeddingCache | None = None,
) -> Plan:
    """The memory that `fit_together` will take with these arguments; nothing is fitted."""
    first, several = detectors[0], len(detectors) > 1
    method = first._build(datasets[0].image_size)
    parts = [detector._split(data) for detector, data in zip(detectors, datasets, strict=True)]
    chosen, held = [part[0] for part in parts], [part[1] for part in parts]
    return estimate(
        method,
        first.load_frozen(learning=True),
        chosen if several else chosen[0],
        mesh=mesh,
        classes_per_step=classes_per_step,
        batch_size=first.batch_size,
        cache=EmbeddingCache(first.storage, shared=False) if cache is None else cache,
        scoring=any(map(len, held)),
    )


_SAVED = (
    *("method", "hyperparameters", "preprocess", "holdout", "fpr", "precision", "seed", "batch_size"),
    *("backbones", "image_size", "n_train", "normal_level"),
)
"""The fields of model.json, written by `Detector.save`."""


def load(directory: str | Path, *, weights: str | Path | Sequence[str | Path] | None = None) -> Detector:
    """A saved detector.

    Args:
        directory: What `Detector.save` or `jaxad fit` wrote.
        weights: Where the backbone's weights are now, if not where they were.

    Raises:
        FileNotFoundError: There is no model, or the backbone's weights are gone.
        ValueError: The files are damaged, or the backbone's weights are others than in fit.
    """
    directory = Path(directory)
    saved = artifact.read_description(directory, _SAVED)
    files = [entry["path"] if Path(entry["path"]).is_file() else None for entry in saved["backbones"]]
    resize, crop = (
        None if v is None else tuple(v) for v in (saved["preprocess"]["resize"], saved["preprocess"]["center_crop"])
    )
    hyperparameters: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in saved["hyperparameters"].items()
    }
    detector = Detector(
        saved["method"],
        backbone=[entry["name"] for entry in saved["backbones"]],
        weights=files if weights is None else weights,
        image_size=resize,
        center_crop=crop,
        **{k: saved[k] for k in ("holdout", "fpr", "precision", "seed", "batch_size")},
        **hyperparameters,
    )
    for wanted, found in zip(saved["backbones"], detector.sources(), strict=True):
        if wanted["sha256"] != found["sha256"]:
            raise ValueError(
                f"the model in {directory} needs the weights {wanted['name']} with the sha256 {wanted['sha256']}, but "
                f"{found['path']} has {found['sha256']}: give the file that it was fitted with"
            )
    size = tuple(saved["image_size"])
    method, frozen = detector._build(size), detector.load_frozen()
    image = jax.ShapeDtypeStruct((saved["n_train"], *size, 3), np.uint8)
    spec = jax.eval_shape(method.embed, frozen, image)
    detector.state = artifact.load_state(directory, abstract_state(method, frozen, spec))
    detector.n_train, detector.normal_level = saved["n_train"], saved["normal_level"]
    path = directory / "threshold.json"
    values = files.read_json(path) if path.is_file() else {}
    detector.image_threshold, detector.pixel_threshold = thresholds.pair_from_json(values, path)
    return detector


def peak_bytes() -> int:
    """Most memory used so far: of the accelerator where it tells, else of this process."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _pair(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(itertools.islice(size, 3))
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"a size must be one positive number or (height, width), got {size}")
    return pair
