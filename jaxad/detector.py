"""The facade: any method, a folder of photographs in, scores and heat maps out."""

import copy
import dataclasses
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxad import artifact, files
from jaxad.base import Frozen, Method, Scores, State
from jaxad.data import Dataset, Preprocess, open_data
from jaxad.data.arrays import with_batch_axis
from jaxad.data.dataset import check_normals
from jaxad.data.depth import usual_bits
from jaxad.data.images import MaskThreshold
from jaxad.driver import fork
from jaxad.driver.execution import Execution
from jaxad.driver.program import Program
from jaxad.driver.programs import abstract_state, embedded_spec
from jaxad.driver.scoring import batch_sizes, programs, score
from jaxad.learning import Model, abstract_frozen, configured, leakage, learn, load_frozen, load_photographs
from jaxad.metrics import Threshold
from jaxad.metrics import threshold as thresholds
from jaxad.settings import Settings
from jaxad.text import printable


class Prediction(NamedTuple):
    """The result of `Detector.predict`, one entry an image, in order."""

    paths: tuple[str, ...]
    pred_score: Float[np.ndarray, "n"]
    """Anomaly scores: higher is more anomalous; not normalized."""
    pred_label: Bool[np.ndarray, "n"] | None
    """Whether the score is above the image threshold; None where there is no threshold."""
    anomaly_map: Float[np.ndarray, "n h w"] | None
    """Heat maps on the preprocessed image; None for methods without. Ignored pixels have the smallest score of the
    others."""
    pred_mask: Bool[np.ndarray, "n h w"] | None
    """Where the heat map is above the pixel threshold, and not ignored."""
    ignored: Bool[np.ndarray, "n h w"] | None = None
    """Pixels that do not count; None if all do."""

    def __repr__(self) -> str:
        scores = f", pred_score {self.pred_score.min():.4g} to {self.pred_score.max():.4g}" if self.paths else ""
        anomalous = "" if self.pred_label is None else f", {self.pred_label.sum()} anomalous"
        maps = "" if self.anomaly_map is None else ", anomaly_map {} x {}".format(*self.anomaly_map.shape[1:])
        return f"<Prediction n={len(self.paths)}{scores}{anomalous}{maps}>"


class Detector:
    """Learns from normal images, then scores new ones; the same class for every method.

    Args:
        method: A name in `jaxad list`.
        options: Fields of `jaxad.settings.Settings` (backbone, weights, auxiliary, image_size, center_crop, ignore,
            ignore_margin, bits, holdout, cross_holdout, fpr, tail, precision, cache, cache_dtype, seed, batch_size),
            and hyperparameters of the method.

    Raises:
        ValueError: An unknown method, backbone or hyperparameter, or a value out of its range.
    """

    def __init__(self, method: str = "patchcore", **options: Any) -> None:
        self.settings = Settings.of(method, **options)
        self._bits = self.settings.bits
        self.model: Model | None = None
        self._frozen: Frozen = None
        self._photographs: tuple[tuple[int, int], Any] | None = None
        self._programs: set[Program] = set()
        self._substitute: fork.Substitute | None = None

    @classmethod
    def from_settings(cls, settings: Settings, model: Model | None = None, frozen: Frozen = None) -> "Detector":
        """A detector of these settings, with a model that `learn` fitted and pretrained weights that are read."""
        detector = cls.__new__(cls)
        detector.settings, detector.model, detector._bits = settings, model, settings.bits
        detector._frozen, detector._photographs = frozen, None
        detector._programs, detector._substitute = set(), None
        return detector

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.settings.hyperparameters.items())
        fitted = "not fitted"
        if self.model is not None:
            height, width = self.model.image_size
            threshold = f", threshold {self.image_threshold.value:.4g}" if self.image_threshold else ""
            fitted = f"fitted, n_train={self.model.n_train}, {height} x {width}{threshold}"
        return f"<Detector {self.settings.method}{options}: {fitted}>"

    def __copy__(self) -> "Detector":
        return self.from_settings(self.settings, self.model, self._frozen)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Detector":
        del memo
        return copy.copy(self)  # whose arrays nobody can change

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as `save` writes it: weights are named, not copied, and checked again by their sha256."""
        if self.model is None:
            return _unpickled, (self.settings,)
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            saved = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        return _unpickled, (self.settings, self.model._replace(state=None, seconds=dict(self.model.seconds)), saved)

    @property
    def method(self) -> Method:
        """The pure functions, for images of the size that it was fitted on, or else of the size that is set."""
        return self.settings.build(self.model.image_size if self.model else self.settings.usual_size())

    @property
    def batch_size(self) -> int:
        """Images at a time; may be set."""
        return self.settings.batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        """Raises ValueError for a number below 1."""
        settings = dataclasses.replace(self.settings, batch_size=value)
        settings.check()
        self.settings = settings

    @property
    def state(self) -> State:
        """What the method has learned; None before `fit`."""
        return self.model and self.model.state

    @property
    def image_threshold(self) -> Threshold | None:
        """For image scores; None before `fit`, or where no images were held out."""
        return self.model and self.model.image_threshold

    @property
    def pixel_threshold(self) -> Threshold | None:
        """For pixels of heat maps; None before `fit`, without heat maps, or where no images were held out."""
        return self.model and self.model.pixel_threshold

    def fit(
        self,
        source: Any,
        *,
        category: str | None = None,
        mask_threshold: MaskThreshold = None,
        group_by: str | None = None,
        pages: bool = False,
        skip_broken: bool = False,
        execution: Execution = Execution(),
    ) -> "Detector":
        """Learns from the normal images of a source.

        Warns if the images look like several shots of the same parts and have no groups, and if 16-bit images use a
        sixteenth of their range: then these are read as images of 8, 10 or 12 bits, also when they are scored.

        Args:
            source: What `jaxad.open_data` opens (a folder, a CSV, "tfds:NAME", "demo", arrays), or a `Dataset`.
            category: Which product class, where the source has several.
            mask_threshold: A mask pixel counts where it is above; None: as for `jaxad.open_data`.
            group_by: As for `jaxad.open_data`: a regular expression for the part in a file's path, such as
                "(tile[0-9]+)_". Images of one part are held out together.
            pages: As for `jaxad.open_data`: read all pages or frames of a file, not only the first.
            skip_broken: Leave out images that cannot be read, with a warning that names them.
            execution: Devices, checkpoint and progress; a cache that several detectors share needs the same weights
                (`load_frozen`). The batch size is that of the settings.

        Returns:
            The detector itself.
        """
        fork.check()
        options: dict[str, Any] = dict(mask_threshold=mask_threshold, group_by=group_by, pages=pages)
        options["broken"] = "skip" if skip_broken else "refuse"
        data = source if isinstance(source, Dataset) else self._open(source, category, "train", self._bits, **options)
        check_normals(data)
        bits, warning = (self._bits, "") if self._bits else usual_bits([data])
        if warning:
            warnings.warn(printable(warning), stacklevel=2)
        data = data.with_bits(bits).ignoring(self.settings.ignore)
        settings = dataclasses.replace(self.settings, bits=bits).ignoring(data.preprocess.ignore)
        if signs := leakage(settings, data):
            warnings.warn(printable(signs), stacklevel=2)
        photographs = self.load_photographs(data.image_size)
        frozen = self.load_frozen()
        self.model = learn([settings], [data], execution, frozen=frozen, auxiliary=photographs).models[0]
        self.settings, self._programs = settings, programs(self.method, execution)
        return self

    def warm_up(self, execution: Execution = Execution()) -> "Detector":
        """Compiles all that scoring can need, so that no later call waits for it: for 1, 2, 4, ... images at a time.

        Args:
            execution: As for `predict`.

        Returns:
            The detector itself.

        Raises:
            ValueError: The detector is not fitted.
        """
        size = self._fitted().image_size
        for n in batch_sizes(configured(execution, self.settings)):
            black = open_data(np.zeros((n, *size, 3), np.uint8), preprocess=Preprocess(None))["arrays"].train
            assert black is not None
            for _ in self.score(black, execution):
                pass
        return self

    def score(self, data: Dataset, execution: Execution = Execution()) -> Iterator[tuple[np.ndarray, Scores]]:
        """Scores batch by batch: yields (indices, `Scores`); memory does not grow with the number of images.

        Raises:
            ValueError: The detector is not fitted, or the images are of another size than those it was fitted on.
        """
        size = self._fitted().image_size
        if data.image_size != size:
            raise ValueError(f"images must be {size} (height, width) as in fit, got {data.image_size}: set image_size")
        data = data.with_bits(self.settings.bits).ignoring(self.settings.ignore)
        if fork.forked():
            return self._score_elsewhere(data, execution)
        execution = configured(execution, self.settings)
        self._programs |= programs(self.method, execution, data.ignores)
        return score(self.method, self.state, self.load_frozen(), data, execution)

    def _fitted(self) -> Model:
        if self.model is None:
            raise ValueError("a detector must be fitted before it scores: call fit, or jaxad.load a saved one")
        return self.model

    def _score_elsewhere(self, data: Dataset, execution: Execution) -> Iterator[tuple[np.ndarray, Scores]]:
        if execution.mesh is not None or data.ignores:
            fork.check()
        if self._substitute is None or self._substitute.owner != os.getpid():
            self._substitute = fork.Substitute(self)
        for first in range(0, len(data), self.batch_size):
            rows = np.arange(first, min(first + self.batch_size, len(data)))
            yield rows, self._substitute.score(data.images(rows))
            if execution.progress:
                execution.progress("score", int(rows[-1]) + 1, len(data))

    def color_limits(self) -> tuple[float, float] | None:
        """The pixel scores at which the colors of heat maps begin and end, the same for every image.

        They begin at the median pixel of held-out normal images and reach the pixel threshold halfway.

        Returns:
            None where there were no held-out images or the method gives no heat maps.
        """
        if self.model is None or self.model.normal_level is None or self.model.pixel_threshold is None:
            return None
        low, threshold = self.model.normal_level, self.model.pixel_threshold.value
        return low, low + 2 * max(0.0, threshold - low)

    def predict(
        self,
        source: Any,
        *,
        category: str | None = None,
        pages: bool = False,
        skip_broken: bool = False,
        execution: Execution = Execution(),
    ) -> Prediction:
        """Scores images and compares them with the thresholds.

        Args:
            source: A path, a list of paths, a folder, an array (h w, h w c or n h w c) of numpy or JAX, an image of
                Pillow, an encoded file as bytes, a list of such, or a `Dataset`. Of a folder in a layout with a test
                split, the test images.
            category: Which product class, where the source has several.
            pages: As for `fit`.
            skip_broken: As for `fit`; `Prediction.paths` has those that are scored.
            execution: As for `fit`.
        """
        options: dict[str, Any] = dict(pages=pages, broken="skip" if skip_broken else "refuse")
        bits = self.settings.bits
        data = source if isinstance(source, Dataset) else self._open(source, category, "test", bits, **options)
        ignored = data.ignoring(self.settings.ignore).ignored(range(len(data)))
        parts = [scores for _, scores in self.score(data, execution)]
        image = np.concatenate([s.image for s in parts])
        maps = [s.pixel for s in parts if s.pixel is not None]
        pixel = np.concatenate(maps) if maps else None
        label = None if self.image_threshold is None else image > self.image_threshold.value
        mask = None if pixel is None or self.pixel_threshold is None else pixel > self.pixel_threshold.value
        mask = mask if mask is None or ignored is None else mask & ~ignored
        return Prediction(data.paths, image, label, pixel, mask, ignored)

    def save(self, directory: str | Path, state: State = None) -> None:
        """Writes model.safetensors, model.json and threshold.json; pretrained weights are named, not copied.

        Args:
            directory: Created where missing.
            state: `self.state` in the memory of this process, where it is spread over several.
        """
        if self.model is None:
            raise ValueError("a detector must be fitted before it is saved: call fit")
        description = self.settings.to_json() | {
            "backbones": self.settings.sources(),
            "image_size": self.model.image_size,
            "n_train": self.model.n_train,
            "normal_level": self.model.normal_level,
        }
        artifact.save_state(directory, self.model.state if state is None else state)
        pair = thresholds.Thresholds(self.model.image_threshold, self.model.pixel_threshold)
        files.write_json(Path(directory) / "threshold.json", thresholds.pair_to_json(pair))
        artifact.save_description(directory, description)

    def load_frozen(self) -> Frozen:
        """The pretrained weights, read once."""
        if self._frozen is None:
            self._frozen = load_frozen(self.settings)
        return self._frozen

    def load_photographs(self, image_size: tuple[int, int]) -> jax.Array | None:
        """The auxiliary photographs at the size of the images, read once; None where the method uses none."""
        if self._photographs is None or self._photographs[0] != image_size:
            method = self.settings.build(image_size)
            self._photographs = image_size, load_photographs(self.settings, method, image_size)
        return self._photographs[1]

    def _open(self, source: Any, category: str | None, split: str, bits: int | None, **options: Any) -> Dataset:
        """The only category of a source, or the one asked for."""
        opened = open_data(
            with_batch_axis(source),
            category=category,
            preprocess=self.settings.preprocess._replace(bits=bits),
            layout="any" if split == "test" else "auto",
            **options,
        )
        if len(opened) > 1:
            raise ValueError(f"one category at a time: choose category from {', '.join(opened)}")
        splits = next(iter(opened.values()))
        return splits.train if split == "train" or splits.test is None else splits.test


def load(directory: str | Path, *, weights: str | Path | Sequence[str | Path] | None = None) -> Detector:
    """A saved detector.

    Args:
        directory: What `Detector.save` or `jaxad fit` wrote.
        weights: Where the backbone's weights are now, if not where they were.

    Raises:
        FileNotFoundError: There is no model, or a file of it or the backbone's weights are gone.
        ValueError: The files are damaged or edited, or the backbone's weights are others than in fit.
    """
    directory = Path(directory)
    saved = artifact.read_description(directory)
    paths = [entry["path"] if Path(entry["path"]).is_file() else None for entry in saved["backbones"]]
    names = [entry["name"] for entry in saved["backbones"]]
    size = tuple(saved["image_size"])
    try:
        settings = Settings.from_json(saved, names, paths if weights is None else weights)
        method = settings.build(size)
    except (ValueError, OSError):
        raise
    except Exception as error:  # a value of a wrong type may raise anything
        raise ValueError(f"{directory}/model.json describes no model ({error!r}): {artifact.REMEDY}") from error
    sources = settings.sources()  # none where the method has no backbone
    for wanted, source in zip(saved["backbones"], sources, strict=False):
        if wanted["sha256"] != source["sha256"]:
            raise ValueError(
                f"the model in {directory} needs the weights {wanted['name']} with the sha256 {wanted['sha256']}, but "
                f"{source['path']} has {source['sha256']}: give the file that it was fitted with"
            )
    size = tuple(saved["image_size"])
    shapes, frozen = abstract_frozen(settings), None
    spec = embedded_spec(method.embed, shapes, saved["n_train"], size)
    state = artifact.load_state(directory, abstract_state(method, shapes, spec))
    if not fork.forked():
        frozen, state = load_frozen(settings), jax.tree.map(jnp.asarray, state)
    path = directory / "threshold.json"
    pair = thresholds.pair_from_json(files.read_json(path), path)
    model = Model(size, state, *pair, normal_level=saved["normal_level"], n_train=saved["n_train"])
    return Detector.from_settings(settings, model, frozen)


def _unpickled(
    settings: Settings, model: Model | None = None, saved: Mapping[str, bytes] = MappingProxyType({})
) -> Detector:
    """What `Detector.__reduce__` took apart; `saved` are the files of `Detector.save`."""
    if model is None:
        return Detector.from_settings(settings)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in saved.items():
            (Path(folder) / name).write_bytes(content)
        loaded = load(folder)
    return Detector.from_settings(settings, model._replace(state=loaded.state), loaded._frozen)
