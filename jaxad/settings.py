"""All that is asked for of a detector, as one value. Importing this module does not import JAX.

Options of the command line, JSON, recipes and fingerprints are made from it.
"""

import base64
import dataclasses
import functools
import inspect
import itertools
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jaxad.backbones
from jaxad.methods import factory

if TYPE_CHECKING:
    from jaxad.base import Method
    from jaxad.data import Preprocess
    from jaxad.driver.embedding import Storage

EMBEDDED = "pdn_small"
"""The backbone that comes with the package and needs no download."""
GIVEN = ("backbone", "image_size")
"""Arguments of a method's factory that are no hyperparameters."""
HOLDOUT = 0.2
"""The share of images that is held out where nothing else is said."""
Size = int | tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that is asked for of a detector; made by `Settings.of`, which checks it.

    Args:
        method: A name in `jaxad list`.
        backbone: A name in `jaxad weights list`, or several for an ensemble; none is the one that the weights are named
            after, or without weights the small one that comes with the package, which needs no download. Published
            numbers belong to larger ones. Methods without a backbone ignore it.
        weights: A safetensors file of the backbone (several for several); none: the cache of `jaxad weights fetch`.
        auxiliary: A folder of photographs of other things, for methods that learn from such: efficientad needs them;
            draem, glass and memseg draw anomalies with them, and otherwise with generated textures.
        image_size: Height and width that images are resized to; one number for both, None to leave them as they are.
        center_crop: Height and width cut out of the middle afterwards.
        ignore: Masks of what to ignore in every image, such as a clock or the background: files, or arrays in Python.
            Pixels that are set are filled from around them in fit and in score, and count in no score and no metric.
        ignore_margin: Of the shorter side: pixels so near to masks that only some images have, as in a CSV file, do not
            count either; 0 if the training images have such masks, too.
        bits: How many bits 16-bit images use: 10 or 12 where a camera's white is 1023 or 4095, 16 for the whole range.
            None: 16, or with a warning what the training images use, if that is a sixteenth of the range or less.
        holdout: Share of the normal images that are held out to set the threshold, or of their groups, which stay
            whole; 0.2 unless there is a cross-holdout; 0 uses all images and gives no threshold.
        cross_holdout: In place of that, hold out every normal image or group once, in so many more fits (2 or more; one
            by one from their number on), and learn from all of them.
        fpr: Wanted false-positive rate of the threshold.
        tail: Where too few images are held out for that rate, the threshold is their maximum; "gpd" extrapolates their
            scores with a generalized Pareto distribution, a model without a guarantee.
        precision: What the backbone computes in; "bfloat16" is faster on GPUs and TPUs and halves its memory.
        cache: Where embedded images are cached while a method sees them several times: in the host's memory, or on the
            devices, which then wait for no copy.
        cache_dtype: What they are cached in; "bfloat16" rounds them to half their size.
        seed: Seed of everything random.
        batch_size: Images at a time.
        hyperparameters: Those of the method's factory that differ from its defaults.
    """

    method: str = "patchcore"
    backbone: tuple[str, ...] = ()
    weights: tuple[Path | None, ...] = ()
    auxiliary: Path | None = None
    image_size: Size = 224
    center_crop: Size = None
    ignore: tuple[bytes, ...] = dataclasses.field(default=(), repr=False)
    ignore_margin: float = 0.1
    bits: int | None = None
    holdout: float | None = None
    cross_holdout: int | None = None
    fpr: float = 0.05
    tail: Literal["none", "gpd"] = "none"
    precision: Literal["float32", "bfloat16"] = "float32"
    cache: Literal["host", "device"] = "host"
    cache_dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    batch_size: int = 16
    hyperparameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, method: str = "patchcore", **options: Any) -> "Settings":
        """Settings from names as a user gives them: fields, and hyperparameters of the method.

        Raises:
            ValueError: An unknown method, backbone or hyperparameter, or a value out of its range.
        """
        fields = {field.name for field in dataclasses.fields(cls)} - {"method", "hyperparameters"}
        hyperparameters = {name: value for name, value in options.items() if name not in fields}
        known = set(inspect.signature(factory(method)).parameters) - set(GIVEN)
        unknown = sorted(set(hyperparameters) - known)
        if unknown:
            raise ValueError(f"{method} has the hyperparameters {', '.join(sorted(known))}; got {', '.join(unknown)}")
        chosen = {name: value for name, value in options.items() if name in fields}
        for name in ("image_size", "center_crop"):
            if name in chosen:
                chosen[name] = _pair(chosen[name])
        if chosen.get("ignore") is not None:
            from jaxad.data.ignore import regions

            chosen["ignore"] = regions(chosen["ignore"])
        if chosen.get("auxiliary") is not None:
            chosen["auxiliary"] = Path(chosen["auxiliary"])
        chosen |= _backbones(chosen.get("backbone"), chosen.get("weights"))
        if chosen.get("holdout") is None:
            chosen["holdout"] = HOLDOUT if chosen.get("cross_holdout") is None else 0.0
        settings = cls(method=method, hyperparameters=hyperparameters, **chosen)
        settings.check()
        if not settings.build(settings.usual_size()).pretrained:
            return dataclasses.replace(settings, backbone=(), weights=())
        return settings

    def check(self) -> None:
        """Raises ValueError for a value out of its range."""
        self.check_values()
        self.preprocess.check()
        self.storage.check()

    def check_values(self) -> None:
        """Raises ValueError for what is out of its range whatever the method; needs no JAX."""
        if self.holdout is not None and not 0 <= self.holdout < 1:
            raise ValueError(f"holdout must be in [0, 1), got {self.holdout}")
        if self.cross_holdout is not None and self.cross_holdout < 2:
            raise ValueError(f"cross_holdout must be 2 or more, got {self.cross_holdout}")
        if self.cross_holdout is not None and self.holdout:
            raise ValueError(
                f"holdout and cross_holdout exclude each other, got {self.holdout} and {self.cross_holdout}: omit one"
            )
        if self.tail not in ("none", "gpd"):
            raise ValueError(f'tail must be "none" or "gpd", got "{self.tail}"')
        if not 0 < self.fpr < 1:
            raise ValueError(f"fpr must be in (0, 1), got {self.fpr}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f'precision must be "float32" or "bfloat16", got "{self.precision}"')
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size}")

    def usual_size(self) -> tuple[int, int]:
        """The size for which hyperparameters are checked before any image is seen."""
        resize = self.preprocess.resize
        return self.preprocess.output_size(resize) if resize else (224, 224)

    @property
    def preprocess(self) -> "Preprocess":
        """What is done to every image before it is embedded."""
        from jaxad.data import Preprocess

        sizes = _pair(self.image_size), _pair(self.center_crop)
        return Preprocess(*sizes, self.ignore, self.ignore_margin, self.bits)

    @property
    def storage(self) -> "Storage":
        """How embedded images are cached."""
        from jaxad.driver.embedding import Storage

        return Storage(self.cache, self.cache_dtype)

    def build(self, image_size: tuple[int, int]) -> "Method":
        """The method for images of that size; equal settings give the same one, which compiles once."""
        backbone = self.backbone[0] if len(self.backbone) == 1 else self.backbone
        given = {"image_size": image_size, **({"backbone": backbone} if backbone else {}), **self.hyperparameters}
        arguments = {**_defaults(self.method), **given}
        with _building:
            return _build(self.method, tuple((name, _hashable(arguments[name])) for name in sorted(arguments)))

    def ignoring(self, masks: Sequence[Any]) -> "Settings":
        """The same with more masks of what to ignore."""
        from jaxad.data.ignore import regions

        return dataclasses.replace(self, ignore=regions((*self.ignore, *masks)))

    def varied(self, name: str, value: Any) -> "Settings":
        """The same with another value of a hyperparameter."""
        return dataclasses.replace(self, hyperparameters={**self.hyperparameters, name: value})

    def sources(self) -> list[dict[str, str]]:
        """The name, file and sha256 of each backbone's weights."""
        files = map(jaxad.backbones.source, self.backbone, self.weights)
        return [
            {"name": name, "path": str(Path(file["path"]).absolute()), "sha256": file["sha256"]}
            for name, file in zip(self.backbone, files, strict=True)
        ]

    def to_json(self) -> dict[str, Any]:
        """All that decides what a fit computes, but for the weights (`sources`), as JSON values."""
        return {
            "method": self.method,
            "hyperparameters": dict(self.hyperparameters),
            "auxiliary": None if self.auxiliary is None else str(self.auxiliary.absolute()),
            "preprocess": {name: getattr(self.preprocess, name) for name in ("resize", "center_crop", "bits")},
            "ignore_margin": self.ignore_margin,
            "ignore": [base64.b64encode(mask).decode() for mask in self.ignore],
            "holdout": self.holdout,
            "cross_holdout": self.cross_holdout,
            "fpr": self.fpr,
            "tail": self.tail,
            "precision": self.precision,
            "cache_dtype": self.cache_dtype,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any], backbone: Sequence[str], weights: Any) -> "Settings":
        """The settings of which `to_json` made `saved`, with these weights."""
        resize, crop = (saved["preprocess"][name] for name in ("resize", "center_crop"))
        names = {
            "holdout",
            "cross_holdout",
            "fpr",
            "tail",
            "precision",
            "seed",
            "batch_size",
            "ignore_margin",
        } & saved.keys()
        hyperparameters: dict[str, Any] = {k: _hashable(value) for k, value in saved["hyperparameters"].items()}
        return cls.of(
            saved["method"],
            backbone=tuple(backbone),
            weights=weights,
            image_size=resize and tuple(resize),
            center_crop=crop and tuple(crop),
            ignore=[base64.b64decode(mask) for mask in saved["ignore"]],
            bits=saved["preprocess"].get("bits"),
            **{name: saved[name] for name in names},
            **hyperparameters,
        )


def _hashable(value: Any) -> Any:
    """A hyperparameter as factories take it: sequences are tuples."""
    return tuple(value) if isinstance(value, list) else value


@functools.cache
def _defaults(method: str) -> dict[str, Any]:
    """The hyperparameters that a method's factory has where none are given."""
    parameters = inspect.signature(factory(method)).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


_building = threading.Lock()


@functools.cache
def _build(method: str, arguments: tuple[tuple[str, Any], ...]) -> "Method":
    make = factory(method)
    accepted = inspect.signature(make).parameters
    return make(**{name: value for name, value in arguments if name in accepted or name not in GIVEN})


def _backbones(names: str | Sequence[str] | None, files: Any) -> dict[str, Any]:
    """The backbones and their files, one a backbone."""
    paths = (files,) if isinstance(files, (str, Path)) else tuple(files or ())
    chosen = (names,) if isinstance(names, str) else tuple(names or ())
    chosen = chosen or tuple(EMBEDDED if path is None else jaxad.backbones.of_file(path) for path in paths or (None,))
    paths = paths or (None,) * len(chosen)
    if len(paths) != len(chosen):
        raise ValueError(f"every backbone needs its weights: got {len(chosen)} backbones and {len(paths)} files")
    weights = tuple(None if path is None else Path(path) for path in paths)
    return {"backbone": tuple(map(jaxad.backbones.resolve, chosen, weights)), "weights": weights}


def _pair(size: Size) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(itertools.islice(size, 3))
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"a size must be one positive number or (height, width), got {size}")
    return pair
