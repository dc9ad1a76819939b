"""Options of the command line: what they are called, where they come from, how they are parsed and checked.

This module does not import JAX, so that a mistake is answered at once.
"""

import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from jaxad import methods
from jaxad.backbones import registry
from jaxad.cli.main import COMMANDS
from jaxad.cli.signatures import signature
from jaxad.settings import GIVEN, Settings

Source = Annotated[Positional[str], arg(metavar="SOURCE")]
Runs = Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN_DIR...")]


@dataclasses.dataclass
class Data:
    """What images to take, and where to write.

    Args:
        source: A folder of normal images or in a known layout (MVTec, VisA ...), a CSV file, tfds:NAME, or demo.
        category: One product class, or all of them: those of similar numbers of images, of one size, in one program.
        mask_threshold: A mask pixel counts where it is above; None: half of the mask's maximum, but 0 where that is a
            number of a class (below 64).
        group_by: A regular expression for the part (tile, workpiece, lot) in the path of a file below SOURCE, such as
            "(tile[0-9]+)_": what the parentheses match names it. Images of one part are held out together.
        pages: Read all pages or frames of a file (TIFF, GIF ...), not only the first.
        skip_broken: Leave out images that cannot be read, and name them.
        unified: One model for all classes: OUTPUT/METHOD/DATASET/unified.
        classes_per_step: Classes in memory at the same time; None: as many as fit.
        output: Folder of the runs: OUTPUT/METHOD/DATASET/CATEGORY.
        overwrite: Replace runs there of other images, too; without, such are refused before any work.
        preset: "paper" resizes to 256 and crops to 224, whatever image-size and center-crop say.
        checkpoint_seconds: Least time between two checkpoints, from which a killed run resumes.
        devices: How many devices share the work, classes first, then the images and patches of a class.
        distributed: This is one of several processes that share the work on all of their devices; start each with the
            same command. All of them must see the output folder.
        coordinator: HOST:PORT of process 0; None: from the environment (as are the next two).
        num_processes: Number of processes.
        process_id: Number of this process, counted from 0.
    """

    source: Source
    category: str = "all"
    mask_threshold: float | None = None
    group_by: str | None = None
    pages: bool = False
    skip_broken: bool = False
    unified: bool = False
    classes_per_step: int | None = None
    output: Path = Path("runs")
    overwrite: bool = False
    preset: Literal["paper"] | None = None
    checkpoint_seconds: float = 60.0
    devices: int = 1
    distributed: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


@dataclasses.dataclass
class FitData(Data):
    """What to fit on what, and where to write.

    Args:
        method: A name in `jaxad list`; with --help, its own options are shown below.
    """

    method: str = "patchcore"


@dataclasses.dataclass
class BenchmarkData(Data):
    """What to compare on what, and where to write.

    Args:
        methods: Names in `jaxad list`, each with its default hyperparameters; none means all that the backbone suits.
        seeds: Repetitions, counted up from the seed; several go to OUTPUT/seedN/METHOD/DATASET/CATEGORY.
        sweep: NAME=VALUE,VALUE,... compares values of a hyperparameter from one fit with the largest, for those that a
            fitted model can change (PatchCore's coreset_sampling_ratio and num_neighbors).
        report: Also write an HTML report to this file.
    """

    methods: tuple[str, ...] = ()
    seeds: int = 1
    sweep: str | None = None
    report: Path | None = None


@dataclasses.dataclass
class EstimateData:
    """What would be fitted on what.

    Args:
        method: A name in `jaxad list`, before all options; its own are shown below.
        data: A folder of normal images or in a known layout (MVTec, VisA ...), a CSV file, tfds:NAME, or demo.
        category: One product class, or all of them: those of similar numbers of images, of one size, in one program.
        group_by: As for `jaxad fit`.
        unified: One model for all classes.
        classes_per_step: Classes in memory at the same time; None: all.
        preset: "paper" resizes to 256 and crops to 224, whatever image-size and center-crop say.
        devices: How many devices share the work; they need not be there.
    """

    method: Annotated[Positional[str], arg(metavar="METHOD")]
    data: str
    category: str = "all"
    group_by: str | None = None
    unified: bool = False
    classes_per_step: int | None = None
    preset: Literal["paper"] | None = None
    devices: int = 1


def arguments(command: str, argv: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The function in `jaxad.cli.commands` that a command line means, and its arguments.

    Raises:
        ValueError: Options are missing, unknown or out of their range.
        FileNotFoundError: There is no such source, run or file.
    """
    if command == "weights":
        return _weights_arguments(argv)
    if command not in DATA:
        parsed = call(signature("jaxad.cli.commands", command), prog=f"jaxad {command}", args=argv)
        _check_runs(command, parsed["run"])
        _check_source(parsed.get("source"))
        if command in ("evaluate", "report"):
            _check_page(parsed["report" if command == "evaluate" else "output"])
        return command, parsed
    if command == "fit":
        name = option_before(argv, "method", FitData.method)
    else:
        name = argv[0] if argv and not argv[0].startswith("-") else FitData.method
    groups: dict[str, type] = {"data": DATA[command], "settings": settings_options()}
    if command != "benchmark":
        groups[name] = method_options(name)
    data, options, *hyperparameters = parse(command, COMMANDS[command], argv, groups)
    for backbone in options["backbone"]:
        registry.lookup(backbone)
    Settings(method=name, **options).check_values()
    if command == "benchmark":
        for method in data.methods:
            methods.describe(method)
        if data.sweep:
            sweep_of(data.sweep)
        _check_page(data.report)
    _check_source(data.data if command == "estimate" else data.source)
    return command, {"data": data, "options": options} | dict(zip(["hyperparameters"], hyperparameters, strict=False))


def _weights_arguments(argv: Sequence[str]) -> tuple[str, dict[str, Any]]:
    actions = {word: signature("jaxad.cli.commands", f"weights_{word}") for word in ("list", "fetch", "import")}
    if not argv or argv[0] not in (*actions, "-h", "--help"):
        raise ValueError(f"weights wants one of {', '.join(actions)}, got {argv[0] if argv else 'nothing'}")
    if argv[0] not in actions:
        tyro.extras.subcommand_cli_from_dict(actions, prog="jaxad weights", description=COMMANDS["weights"], args=argv)
    parsed = call(actions[argv[0]], prog=f"jaxad weights {argv[0]}", args=argv[1:])
    if parsed.get("name") is not None:
        registry.lookup(parsed["name"])
    if "file" in parsed and not parsed["file"].is_file():
        raise FileNotFoundError(f"no weights file {parsed['file']}: give a safetensors file")
    return f"weights_{argv[0]}", parsed


def _check_runs(command: str, runs: Path | Sequence[Path]) -> None:
    if isinstance(runs, Path):
        if not (runs / "model.json").is_file():
            raise FileNotFoundError(f"no fitted model in {runs}: pass a directory that `jaxad fit` wrote")
        return
    if not runs:
        raise ValueError("give one or more run directories, such as runs/patchcore/demo")
    for run in runs:
        if not any(run.rglob("recipe.json" if command == "report" else "model.json")):
            raise FileNotFoundError(f"no run in {run}: give a directory that `jaxad fit` wrote")


def _check_source(source: str | None) -> None:
    if source is not None and source != "demo" and not source.startswith("tfds:") and not Path(source).exists():
        raise FileNotFoundError(f"no such file or folder: {source}")


def _check_page(page: Path | None) -> None:
    """A report replaces an earlier report, and nothing else; what it cannot be written to is known before the work."""
    if page is None:
        return
    folder = next(folder for folder in page.absolute().parents if folder.exists())
    if not folder.is_dir():
        raise ValueError(f"a report is a file in a folder, but {folder} is none: give another name than {page}")
    if page.exists() and not page.is_file():
        raise ValueError(f"the output must be a file, but {page} is something else: give another name")
    if page.is_file():
        with page.open("rb") as file:
            start = file.read(15).lower()
        if start not in (b"", b"<!doctype html>"):
            raise ValueError(f"a report replaces no file that is not an HTML page, got {page}: give another name")


DATA = {"fit": FitData, "benchmark": BenchmarkData, "estimate": EstimateData}


def option_before(argv: Sequence[str], name: str, default: str) -> str:
    """The value of an option before the others are known."""
    for word, following in itertools.pairwise([*argv, ""]):
        option, _, value = word.partition("=")
        if option == f"--{name}":
            return value or following
    return default


def parse(command: str, description: str, argv: Sequence[str], groups: dict[str, type]) -> list[Any]:
    """Parses options by group; all but the first come back as dictionaries."""
    options = dataclasses.make_dataclass("Options", groups.items())
    config = (tyro.conf.OmitArgPrefixes,)
    parsed = call(options, prog=f"jaxad {command}", description=description, args=argv, config=config)
    first, *others = (getattr(parsed, group) for group in groups)
    return [first, *map(vars, others)]


def call(run: Callable[..., Any], *, prog: str, **options: Any) -> Any:
    """`tyro.cli`, whose framed error messages become one line."""

    @functools.wraps(run)
    def later(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return lambda: run(*args, **kwargs)

    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            bound = tyro.cli(later, prog=prog, **options)
    except SystemExit as done:
        if done.code != 2:  # help, or a signal
            raise
        words = [line.strip(" │|") for line in message.getvalue().splitlines()[1:-1]]  # the frame has a title
        parts = [list(part) for text, part in itertools.groupby(words, lambda word: word.strip("─-") != "") if text]
        hints = [f"did you mean {part[1]}?" for part in parts if part[0].startswith("Perhaps")]
        raise ValueError("; ".join([" ".join(parts[0]).rstrip("."), *hints, f"see {prog} --help"])) from None
    return bound()


def settings_options() -> type:
    """Options for the fields of `Settings`; several backbones and several masks are given one by one."""
    several = {"backbone": UseAppendAction[tuple[str, ...]]}
    several |= dict.fromkeys(("weights", "ignore"), UseAppendAction[tuple[Path, ...]])
    fields = [
        (field.name, several.get(field.name, field.type), field.default)
        for field in dataclasses.fields(Settings)
        if field.name not in ("method", "hyperparameters")
    ]
    return _dataclass("Settings", fields, Settings.__doc__)


def method_options(name: str) -> type:
    """Options for the hyperparameters of a method."""
    methods.describe(name)  # refuses unknown names
    make = signature(f"jaxad.methods.{name}", name, omit=GIVEN)
    hints = typing.get_type_hints(make)
    parameters = inspect.signature(make).parameters.values()
    return _dataclass("Hyperparameters", [(p.name, hints[p.name], p.default) for p in parameters], make.__doc__)


def _dataclass(name: str, fields: list[tuple[str, Any, Any]], doc: str | None) -> type:
    options = dataclasses.make_dataclass(name, fields)
    options.__doc__ = doc
    return options


def settings_of(name: str, preset: str | None, options: dict[str, Any]) -> Settings:
    """The settings of a method from parsed options."""
    if preset == "paper":
        from jaxad.data import PAPER

        options = options | {"image_size": PAPER.resize, "center_crop": PAPER.center_crop}
    return Settings.of(name, **options)


def sweep_of(text: str) -> tuple[str, tuple[float | int, ...]]:
    """The name and the values of --sweep."""
    name, _, values = text.partition("=")
    try:
        numbers = [float(value) if "." in value or "e" in value else int(value) for value in values.split(",")]
    except ValueError:
        raise ValueError(f"sweep must be NAME=VALUE,VALUE,... with numbers, got {text}") from None
    if len(set(numbers)) < 2:
        raise ValueError(f"a sweep needs two different values or more, got {text}")
    return name.replace("-", "_"), tuple(numbers)
