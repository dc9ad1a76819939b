"""Reads prepared TFDS data sets without TensorFlow, through random access to array_record files."""

import contextlib
import functools
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import lazy_imports_utils

from jaxad.data import builders  # noqa: F401  (registers our builders)
from jaxad.data.records import GOOD, Record, defect_of

lazy_imports_utils.print = lambda *words: None  # type: ignore[attr-defined]  # a banner: TensorFlow is not needed
logging.getLogger("absl").addFilter(lambda record: "datasets" not in record.pathname or record.levelno >= logging.ERROR)

_SOURCE = re.compile(r"tfds:(?P<name>\w[\w.+-]*(/\w[\w.+-]*)?(:\d[\d.*]*)?)(:(?P<data_dir>.+))?")
FEATURES = ("BBoxFeature", "ClassLabel", "FeaturesDict", "Image", "Scalar", "Sequence", "Tensor", "Text")
"""The feature classes of TFDS that a data set on disk may name; TFDS would import any module for others."""


def read(source: str) -> tuple[str, Iterator[Record]]:
    """Reads a prepared data set with the features image and label, and optionally mask, category, defect and id.

    An image is normal if its class is named good, ok or normal, or if its label is 0 and the classes have no names. A
    data set without such a class is read one-vs-rest: every class is a category, whose training images are normal and
    whose test set contains the images of all classes.

    Args:
        source: "tfds:NAME" or "tfds:NAME:DATA_DIR"; NAME may include a config and a version (name/config:1.0.0).

    Returns:
        The name of the data set and its records.

    Raises:
        FileNotFoundError: there is no such data set, or it has not been prepared as array_record.
        ValueError: the source is misspelled, or the data set lacks a feature or a training split.
    """
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise ValueError(f"a TFDS source must have the form tfds:NAME or tfds:NAME:DATA_DIR, got {source!r}")
    name, data_dir = match["name"], match["data_dir"]
    if data_dir and not Path(data_dir).is_dir():
        raise FileNotFoundError(f"no such folder: {data_dir}")
    try:
        with _known_features():
            builder: Any = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        raise FileNotFoundError(f"TFDS has no data set {name!r} in {data_dir or 'its default folder'}") from None
    except Exception as error:  # of JSON, protocol buffers and TFDS, which have no common class
        raise ValueError(f"{source} cannot be read ({error}): prepare it again") from error
    features = builder.info.features
    if not isinstance(features, tfds.features.FeaturesDict) or not {"image", "label"} <= set(features):
        raise ValueError(f"{source} must have the features image and label, got {features}")
    if not builder.is_prepared():
        raise FileNotFoundError(
            f"{source} is not prepared in {builder.data_dir}: run tfds.builder({name!r}).download_and_prepare("
            "file_format='array_record')"
        )
    images = [key for key in ("image", "mask") if key in features]
    for key in images:
        if not isinstance(features[key], tfds.features.Image) or features[key].np_dtype == np.float32:
            raise ValueError(f"{key} of {source} must be an integer Image feature, got {features[key]}")
    splits = {"train": "train", "test": "test" if "test" in builder.info.splits else "validation"}
    skip: Any = {key: tfds.decode.SkipDecoding() for key in images}
    try:
        data = {
            split: builder.as_data_source(key, decoders=skip)
            for split, key in splits.items()
            if key in builder.info.splits
        }
    except NotImplementedError as error:
        raise FileNotFoundError(
            f"{source} is prepared as {builder.info.file_format}, which needs TensorFlow: prepare it again with "
            "file_format='array_record'"
        ) from error
    return builder.name, _records(builder.name, features, data)


@contextlib.contextmanager
def _known_features() -> Iterator[None]:
    """While TFDS reads features.json, it takes none but the classes in `FEATURES`, and imports nothing."""
    base: Any = tfds.features.FeatureConnector
    original = base.__dict__["cls_from_name"]

    def class_of(name: str) -> Any:
        module, _, kind = name.rpartition(".")
        if not module.startswith("tensorflow_datasets.core.features.") or kind not in FEATURES:
            raise ValueError(f"a feature must be one of {', '.join(FEATURES)} of TFDS, got {name}")
        return getattr(tfds.features, kind)

    base.cls_from_name = staticmethod(class_of)
    try:
        yield
    finally:
        base.cls_from_name = original


def _records(name: str, features: Any, data: dict[str, Any]) -> Iterator[Record]:
    names = getattr(features["label"], "names", None) or ()
    one_vs_rest = bool(names) and not any(defect_of(label) == GOOD and label != "0" for label in names)
    for split, index, source, example in _examples(data):
        fields = {key: _text(features[key], value) for key, value in example.items() if key not in ("image", "mask")}
        path = f"{name}/{fields.get('id', f'{split}/{index}')}"
        image = functools.partial(_fetch, source, index, "image")
        label = fields["label"]
        if one_vs_rest:
            for category in names if split == "test" else (label,):
                yield Record(path, image, category, split, GOOD if category == label else label)
        else:
            defect = defect_of(label)
            defect = defect if defect == GOOD else fields.get("defect", defect)
            mask = functools.partial(_fetch, source, index, "mask") if "mask" in features and defect != GOOD else None
            yield Record(path, image, fields.get("category", name), split, defect, mask)


def _examples(data: dict[str, Any]) -> Iterator[tuple[str, int, Any, dict[str, Any]]]:
    """Yields every example with its split, index and source; reads 64 at a time to be fast in little memory."""
    for split, source in data.items():
        for start in range(0, len(source), 64):
            indices = range(start, min(start + 64, len(source)))
            for index, example in zip(indices, _read(source, indices), strict=True):
                yield split, index, source, example


def _fetch(source: Any, index: int, key: str) -> bytes:
    return _read(source, [index])[0][key]


def _read(source: Any, indices: Sequence[int]) -> Any:
    try:
        return source.__getitems__(indices)
    except Exception as error:  # of array_record and protocol buffers, which have no common class
        raise ValueError(f"the array_record files cannot be read ({error}): prepare the data set again") from error


def _text(feature: Any, value: Any) -> str:
    if isinstance(feature, tfds.features.ClassLabel):
        return feature.int2str(int(value))
    return value.decode() if isinstance(value, bytes) else str(value)
