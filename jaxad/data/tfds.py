"""Reads prepared TFDS data sets without TensorFlow, through random access to array_record files."""

import functools
import logging
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import lazy_imports_utils

from jaxad.data import builders  # noqa: F401  (registers our builders)
from jaxad.data.records import GOOD, Record, defect_of

lazy_imports_utils.print = lambda *words: None  # type: ignore[attr-defined]  # a banner: TensorFlow is not needed
logging.getLogger("absl").addFilter(lambda record: "datasets" not in record.pathname or record.levelno >= logging.ERROR)

_SOURCE = re.compile(r"tfds:(?P<name>[^:]+(:\d[\d.*]*)?)(:(?P<data_dir>.+))?")


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
    try:
        builder: Any = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        raise FileNotFoundError(f"TFDS has no data set {name!r} in {data_dir or 'its default folder'}") from None
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
            for index, example in zip(indices, source.__getitems__(indices), strict=True):
                yield split, index, source, example


def _fetch(source: Any, index: int, key: str) -> bytes:
    return source[index][key]


def _text(feature: Any, value: Any) -> str:
    if isinstance(feature, tfds.features.ClassLabel):
        return feature.int2str(int(value))
    return value.decode() if isinstance(value, bytes) else str(value)
