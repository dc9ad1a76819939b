"""The command line: `jaxad fit | score | evaluate | benchmark | estimate | report | list | weights`.

Tables go to stdout, everything else to stderr. What a user did wrong is one line and exit code 2 (`JAXAD_DEBUG=1` shows
the traceback), an interruption one line and exit code 130. Only commands that need JAX import it.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Column, Table
from tyro.conf import Positional, UseAppendAction, arg

import jaxad
from jaxad.driver import distributed
from jaxad.progress import Bars, be_silent, interrupt, say, uninterrupted

PLAN_COLUMNS = ("weights", "state", "images", "temporaries", "each device", "host")
"""What `jaxad estimate` prints of every program."""

Source = Annotated[Positional[str], arg(metavar="SOURCE")]
Runs = Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN_DIR...")]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; `argv` is for tests."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # XLA calls it from all of its own threads at once
    if argv is None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        signal.signal(signal.SIGINT, interrupt)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except RuntimeError as error:
        if distributed.joined() and type(error).__name__ == "JaxRuntimeError":  # a collective operation broke off
            distributed.lose()
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, OSError) as error:
        return refused(error)


def refused(error: ValueError | OSError) -> int:
    """Says in one line what is wrong with the input, and returns the exit code; with JAXAD_DEBUG raises the error."""
    if os.environ.get("JAXAD_DEBUG"):
        raise error
    words = str(error)
    if isinstance(error, OSError) and error.strerror:
        words = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return _fail(f"error: {' '.join(words.split())}", 2)


def _dispatch(argv: list[str]) -> int:
    name, *rest = argv or ["--help"]
    if name in ("fit", "score", "evaluate", "benchmark", "estimate") and not {"-h", "--help"} & set(rest):
        with uninterrupted():
            importlib.import_module("jaxad.runs")
    if name in ("-h", "--help"):
        lines = [f"  {command:<10} {(inspect.getdoc(run) or '').splitlines()[0]}" for command, run in COMMANDS.items()]
        print("usage: jaxad COMMAND [OPTIONS]\n", jaxad.__doc__, "", *lines, sep="\n")
        print("\n`jaxad COMMAND --help` shows the options of a command. Try: jaxad benchmark demo --methods patchcore")
    elif name == "--version":
        print(f"jaxad {jaxad.__version__}")
    elif name in ("fit", "benchmark", "estimate", "weights"):
        COMMANDS[name](rest)
    elif name in COMMANDS:
        _tyro(COMMANDS[name], prog=f"jaxad {name}", args=rest)
    else:
        return _fail(f"error: no command {name!r}: choose one of {', '.join(COMMANDS)}", 2)
    return 0


@dataclasses.dataclass
class Data:
    """What images to take, and where to write.

    Args:
        source: A folder of normal images or in a known layout (MVTec, VisA ...), a CSV file, tfds:NAME, or demo.
        category: One product class, or all of them: those of about as many images, of one size, in one program.
        mask_threshold: A mask pixel counts where it is above.
        unified: One model for all classes together: OUTPUT/METHOD/DATASET/unified.
        classes_per_step: Classes in memory at the same time; None: as many as fit.
        output: Folder of the runs: OUTPUT/METHOD/DATASET/CATEGORY.
        preset: "paper" resizes to 256 and crops to 224, whatever image-size and center-crop say.
        checkpoint_seconds: Least time between two checkpoints, from which a killed run goes on.
        devices: How many devices share the work, classes first, then the images and patches of a class.
        distributed: This is one of several processes, on all of whose devices the work is done; start all of them with
            the same command. The output must be a folder that all of them see.
        coordinator: HOST:PORT of process 0; None: from the environment (as are the next two).
        num_processes: Number of processes.
        process_id: Number of this process, counted from 0.
    """

    source: Source
    category: str = "all"
    mask_threshold: int = 0
    unified: bool = False
    classes_per_step: int | None = None
    output: Path = Path("runs")
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
        methods: Names in `jaxad list`, each with its default hyper-parameters; none means all that the backbone suits.
        seeds: Repetitions, counted up from the seed; several go to OUTPUT/seedN/METHOD/DATASET/CATEGORY.
        sweep: NAME=VALUE,VALUE,... compares values of a hyper-parameter from one fit with the largest, for those that a
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
        category: One product class, or all of them: those of about as many images, of one size, in one program.
        unified: One model for all classes together.
        classes_per_step: Classes in memory at the same time; None: all.
        preset: "paper" resizes to 256 and crops to 224, whatever image-size and center-crop say.
        devices: How many devices share the work; they need not be there.
    """

    method: Annotated[Positional[str], arg(metavar="METHOD")]
    data: str
    category: str = "all"
    unified: bool = False
    classes_per_step: int | None = None
    preset: Literal["paper"] | None = None
    devices: int = 1


def fit(argv: list[str]) -> None:
    """Learn from normal images."""
    name = _peek(argv, "method", FitData.method)
    groups = {"data": FitData, "detector": _detector_options(), name: _method_options(name)}
    data, options, hyperparameters = _parse("fit", argv, groups)
    _join(data)
    detector = _detector(name, data, options | hyperparameters)
    opened = _open(data, detector)
    run_dirs = [run_dir for fitted in _fit(detector, opened, data, ["fit", *argv]) for run_dir in fitted.run_dirs]
    saved = shlex.quote(str(run_dirs[0] if len(run_dirs) == 1 else run_dirs[0].parent))
    following = f"evaluate {saved}" if any(split.test for split in opened.values()) else f"score {saved} NEW_IMAGES"
    say(f"saved in {saved}; next: jaxad {following}")


def benchmark(argv: list[str]) -> None:
    """Fit and evaluate several methods on every category, side by side."""
    from jaxad import runs
    from jaxad.methods import METHODS
    from jaxad.report.tables import metrics_table

    data, options = _parse("benchmark", argv, {"data": BenchmarkData, "detector": _detector_options()})
    if data.seeds < 1:
        raise ValueError(f"seeds must be 1 or more, got {data.seeds}")
    sweep = _sweep(data.sweep) if data.sweep else None
    _join(data)
    detectors, refused = [], {}
    for name in data.methods or METHODS:
        try:
            detector = _detector(name, data, options | vars(_method_options(name)()))
            detector.check_auxiliary()
            detectors.append(detector)
        except ValueError as error:
            if data.methods:
                raise
            refused[name] = error
    if not detectors:
        raise next(iter(refused.values()))
    for name, error in refused.items():
        say(f"without {name}: {error}")
    opened = _open(data, detectors[0])
    without = [category for category, split in opened.items() if split.test is None]
    if without:
        raise ValueError(f"a benchmark needs test images, got none for {', '.join(without)} of {data.source}")
    rows, run_dirs = [], []
    for detector, cache in zip(detectors, runs.shared_caches(detectors), strict=True):
        detector.frozen = detectors[0].load_frozen()
        for fitted in _fit(detector, opened, data, ["benchmark", *argv], data.seeds, cache, sweep):
            found = runs.evaluate_fitted(fitted, opened, source=data.source, cache=cache)
            rows += found.values()
            run_dirs += found
    if rows:  # only one of several processes has them
        _print(metrics_table(sorted(rows, key=lambda row: row.method)))
        _report(run_dirs, data.report)


def estimate(argv: list[str]) -> None:
    """Tell how much memory a fit would take, without fitting."""
    import jax

    from jaxad import runs
    from jaxad.data import open_data

    name = argv[0] if argv and not argv[0].startswith("-") else FitData.method
    groups = {"data": EstimateData, "detector": _detector_options(), name: _method_options(name)}
    data, options, hyperparameters = _parse("estimate", argv, groups)
    detector = _detector(name, data, options | hyperparameters)
    opened = open_data(data.data, category=data.category, preprocess=detector.preprocess)
    detector.frozen = detector.frozen_shapes()
    if data.devices > jax.device_count():
        say(f"{jax.device_count()} of {data.devices} devices are here: compiling for virtual ones on the CPU")
        _on_virtual_devices(data.devices, ["estimate", *argv])
        return
    trains = {category: split.train for category, split in opened.items()}
    where = dict(unified=data.unified, devices=data.devices, classes_per_step=data.classes_per_step)
    for plan in runs.plan_all(detector, trains, **where):
        _print_plan(plan, detector)


def score(
    run: Annotated[Positional[Path], arg(metavar="RUN_DIR")],
    source: Source,
    category: str | None = None,
    output: Path | None = None,
    overlays: bool = False,
    maps: bool = False,
    weights: UseAppendAction[tuple[Path, ...]] = (),
) -> None:
    """Score images with a fitted run; heat maps on request.

    Args:
        run: A run directory, or what `Detector.save` wrote.
        source: A folder, one image, a CSV file, tfds:NAME, or demo; of a data set with a test split, the test images.
        category: Product class of the source; None: the run's.
        output: Folder of scores.csv and scores.jsonl; None: RUN_DIR/scores/NAME_OF_SOURCE.
        overlays: Write PNGs with the heat map over the image to OUTPUT/overlays. The colors begin at the median normal
            pixel and reach the pixel threshold halfway, so they mean the same in all images.
        maps: Write the raw heat maps at the original resolution as float32 TIFF to OUTPUT/maps.
        weights: Where the backbone's weights are now, if not where they were.
    """
    from jaxad import rundir, runs

    path = Path(source)
    detector = jaxad.load(run, weights=weights or None)
    split = runs.open_split(
        source, detector, asked=category, fitted=rundir.read_recipe(run).get("category"), any_folder=True
    )
    output = output or run / "scores" / rundir.segment(path.resolve().stem if path.exists() else source)
    root = (path if path.is_dir() else path.parent) if path.exists() else None
    data, options = split.test or split.train, {"labeled": split.test is not None, "overlays": overlays, "maps": maps}
    anomalous = runs.score_run(detector, data, output, root=root, **options)
    threshold = detector.image_threshold
    found = "without a threshold" if threshold is None else f"{anomalous} above the threshold {threshold.value:.4g}"
    folders = [f", {name}/" for name in ("overlays", "maps") if options[name]]
    say(f"{len(data)} images scored, {found}; written to {output}: scores.csv, scores.jsonl{''.join(folders)}")


def evaluate(
    run: Runs,
    source: str | None = None,
    category: str | None = None,
    mask_threshold: int | None = None,
    weights: UseAppendAction[tuple[Path, ...]] = (),
    oracle: bool = False,
    report: Path | None = None,
) -> None:
    """Score the test images of fitted runs, print the metrics and keep them for the report.

    Args:
        run: Run directories, or folders of them.
        source: Labeled images; None: those of the data set that the run was fitted on.
        category: Product class of the source; None: the run's.
        mask_threshold: A mask pixel counts where it is above; None: as in fit.
        weights: Where the backbone's weights are now, if not where they were.
        oracle: Choose the thresholds on the test set itself, and mark them so.
        report: Also write an HTML report to this file.
    """
    from jaxad import rundir, runs
    from jaxad.data import open_data
    from jaxad.report.tables import metrics_table

    rows, written = [], []
    for run_dir in rundir.find(run, "model.json"):
        detector, recipe = jaxad.load(run_dir, weights=weights or None), rundir.read_recipe(run_dir)
        tested = source or recipe.get("source")
        if tested is None:
            raise ValueError(f"{run_dir} does not say what it was fitted on: give the labeled images with --source")
        threshold = recipe.get("mask_threshold", 0) if mask_threshold is None else mask_threshold
        fitted = recipe.get("category")
        if recipe.get("unified") and category is None:
            options = {"preprocess": detector.preprocess, "mask_threshold": threshold}
            opened = {c: split for c, split in open_data(tested, **options).items() if split.test is not None}
            found = runs.evaluate_unified(detector, opened, run_dir, source=tested, oracle=oracle)
            rows += found.values()
            written += found
            continue
        split = runs.open_split(tested, detector, asked=category, fitted=fitted, mask_threshold=threshold)
        if split.test is None:
            raise ValueError(
                f"{tested} has no test images to evaluate on: score images with `jaxad score {run_dir} IMAGES`"
            )
        rows += runs.evaluate_runs([detector], [split.test], [run_dir], source=tested, oracle=oracle)
        written.append(run_dir)
    _print(metrics_table(rows))
    _report(written, report)


def report(run: Runs, output: Path = Path("report.html")) -> None:
    """Write one HTML page about fitted and evaluated runs.

    Args:
        run: Run directories, or folders of them.
        output: The file to write.
    """
    from jaxad import rundir

    _report(rundir.find(run, "recipe.json"), output)


def methods() -> None:
    """List the methods and backbones."""
    from jaxad.backbones import available
    from jaxad.methods import METHODS

    table = Table("method", "what it does", "paper")
    for name, make in METHODS.items():
        text = sys.modules[make.__module__].__doc__ or ""
        paper = re.search(r"^Paper: (.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
        table.add_row(name, text.partition("\n")[0].partition(": ")[2], " ".join(paper[1].split()) if paper else "")
    _print(table)
    known = available()
    print(f"backbones: {', '.join(dict.fromkeys(one.name.partition('.')[0] for one in known))}")
    here = [f"{one.name} ({one.state})" for one in known if one.path]
    print(f"weights here: {', '.join(here) or 'none'}; `jaxad weights list` shows all")


def weights(argv: list[str]) -> None:
    """Manage pretrained weights: list, fetch NAME, import FILE."""
    commands = {"list": weights_list, "fetch": weights_fetch, "import": weights_import}
    if not argv or argv[0] not in (*commands, "-h", "--help"):
        raise ValueError(f"weights wants one of {', '.join(commands)}, got {argv[0] if argv else 'nothing'}")
    if argv[0] in commands:
        _tyro(commands[argv[0]], prog=f"jaxad weights {argv[0]}", args=argv[1:])
    else:
        tyro.extras.subcommand_cli_from_dict(commands, prog="jaxad weights", description=weights.__doc__, args=argv)


def weights_list() -> None:
    """List the weights known by name and where they are."""
    from jaxad.backbones import available

    table = Table("name", "short", "state", "file or address")
    for one in available():
        where = str(one.path or one.url or "import a file of it")
        table.add_row(one.name, one.plain, one.state, where, style="bold" if one.path else None)
    _print(table)


def weights_fetch(name: Annotated[Positional[str], arg(metavar="NAME")]) -> None:
    """Download official weights into the cache; run it again to resume.

    Args:
        name: A name in `jaxad weights list`.
    """
    from jaxad.backbones import fetch

    with Bars(name, "MB", 1e6) as bars:
        path = fetch(name, lambda done, total: bars("fetch", done, total))
    say(f"{name} is in {path}")


def weights_import(file: Annotated[Positional[Path], arg(metavar="FILE")], name: str | None = None) -> None:
    """Copy a safetensors file of your own into the cache, after checking it.

    Args:
        file: Safetensors with timm's or torchvision's names.
        name: The backbone that it is for; None takes it from the file's name.
    """
    from jaxad.backbones import import_file

    say(f"imported as {import_file(file, name)}")


COMMANDS: dict[str, Callable[..., None]] = {
    "fit": fit,
    "score": score,
    "evaluate": evaluate,
    "benchmark": benchmark,
    "estimate": estimate,
    "report": report,
    "list": methods,
    "weights": weights,
}


def _fail(words: str, code: int) -> int:
    print(f"jaxad: {words}", file=sys.stderr, flush=True)
    if distributed.joined():
        distributed.end(code)  # at exit JAX would wait for the other processes
    return code


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _peek(argv: Sequence[str], name: str, default: str) -> str:
    """The value of an option before the rest is known."""
    for given, following in itertools.pairwise([*argv, ""]):
        option, _, value = given.partition("=")
        if option == f"--{name}":
            return value or following
    return default


def _parse(command: str, argv: list[str], groups: dict[str, type]) -> list[Any]:
    """Parses options by group; all but the first come back as dictionaries."""
    options = dataclasses.make_dataclass("Options", groups.items())
    description = inspect.getdoc(COMMANDS[command])
    config = (tyro.conf.OmitArgPrefixes,)
    parsed = _tyro(options, prog=f"jaxad {command}", description=description, args=argv, config=config)
    first, *others = (getattr(parsed, group) for group in groups)
    return [first, *map(vars, others)]


def _tyro(run: Callable[..., Any], *, prog: str, **options: Any) -> Any:
    """`tyro.cli`, whose framed complaints become one line."""

    @functools.wraps(run)
    def later(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return lambda: run(*args, **kwargs)

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            call = tyro.cli(later, prog=prog, **options)
    except SystemExit as done:
        if not done.code:
            raise
        words = [line.strip(" │|") for line in complaint.getvalue().splitlines()[1:-1]]  # the frame has a title
        parts = [list(part) for text, part in itertools.groupby(words, lambda word: word.strip("─-") != "") if text]
        hints = [f"did you mean {part[1]}?" for part in parts if part[0].startswith("Perhaps")]
        raise ValueError("; ".join([" ".join(parts[0]).rstrip("."), *hints, f"see {prog} --help"])) from None
    return call()


def _from_signature(function: Callable, doc: str | None, leave_out: Sequence[str] = (), **types: Any) -> type:
    """A dataclass of a function's keyword-only arguments, with its docstring; those in `types` default to ()."""
    hints = typing.get_type_hints(function)
    wanted = [
        p
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in leave_out
    ]
    fields = [(p.name, types.get(p.name, hints[p.name]), () if p.name in types else p.default) for p in wanted]
    options = dataclasses.make_dataclass("Options", fields)
    options.__doc__ = doc
    return options


def _detector_options() -> type:
    from jaxad.detector import Detector

    several = UseAppendAction[tuple[str, ...]]
    return _from_signature(Detector.__init__, Detector.__doc__, backbone=several, weights=several)


def _method_options(name: str) -> type:
    from jaxad.methods import factory

    return _from_signature(factory(name), factory(name).__doc__, ("backbone", "image_size"))


def _detector(name: str, data: Data | EstimateData, options: dict[str, Any]) -> Any:
    from jaxad.data import PAPER

    if data.preset == "paper":
        options = options | {"image_size": PAPER.resize, "center_crop": PAPER.center_crop}
    options = options | {key: options[key] or None for key in ("backbone", "weights")}
    return jaxad.Detector(name, **options)


def _open(data: Data, detector: Any) -> dict[str, Any]:
    from jaxad.data import open_data

    options = {"preprocess": detector.preprocess, "mask_threshold": data.mask_threshold}
    return open_data(data.source, category=data.category, **options)


def _join(data: Data) -> None:
    """Joins the other processes, if there are any; all but the first fall silent."""
    given = (data.coordinator, data.num_processes, data.process_id)
    if not data.distributed:
        if any(value is not None for value in given):
            raise ValueError("--coordinator, --num-processes and --process-id need --distributed: add it")
        return
    from jaxad.driver.mesh import is_first

    distributed.join(*given)
    if not is_first():
        be_silent()


def _fit(
    detector: Any,
    opened: dict[str, Any],
    data: Data,
    argv: list[str],
    seeds: int = 1,
    cache: Any = None,
    sweep: Any = None,
) -> list[Any]:
    """Fits all categories and seeds: together where the images are about as many and of one size."""
    from jaxad import runs

    source = str(Path(data.source).absolute()) if Path(data.source).exists() else data.source
    recipe = {"source": source, "mask_threshold": data.mask_threshold, "command": shlex.join(["jaxad", *argv])}
    trains = {category: split.train for category, split in opened.items()}
    return runs.fit_all(
        detector,
        trains,
        output=data.output,
        recipe=recipe,
        seeds=seeds,
        unified=data.unified,
        devices=None if data.distributed else data.devices,
        classes_per_step=data.classes_per_step,
        checkpoint_seconds=data.checkpoint_seconds,
        cache=cache,
        sweep=sweep,
    )


def _sweep(text: str) -> Any:
    """What --sweep asks for."""
    from jaxad.detector import Sweep

    name, _, values = text.partition("=")
    try:
        numbers = [float(value) if "." in value or "e" in value else int(value) for value in values.split(",")]
    except ValueError:
        raise ValueError(f"sweep must be NAME=VALUE,VALUE,... with numbers, got {text}") from None
    if len(set(numbers)) < 2:
        raise ValueError(f"a sweep needs two different values or more, got {text}")
    return Sweep(name.replace("-", "_"), tuple(numbers))


def _on_virtual_devices(devices: int, argv: Sequence[str]) -> None:
    """Runs a command in a process of its own that believes to have so many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
    command = [sys.executable, "-m", "jaxad", *argv]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, end="")
    if done.returncode:
        sys.exit(done.returncode)


def _print_plan(plan: Any, detector: Any) -> None:
    """The table of what is in memory while each program runs, and what follows from it."""
    from jaxad.driver.memory import available
    from jaxad.driver.plan import size

    virtual = plan.shared and len(plan.devices) > 1
    table = Table("while this runs", *(Column(name, justify="right") for name in PLAN_COLUMNS))
    for need in plan.needs:
        parts = (need.weights, need.state, need.batch, need.temporaries, need.device, need.host)
        table.add_row(need.name, *map(size, parts), style="bold" if need is plan.peak else None)
    table.add_section()
    table.add_row("the model", "", size(plan.model), "", "", size(plan.model), "")
    _print(table)
    peak, memory = plan.peak, available(plan.devices)
    where = "device and host together" if plan.shared and not virtual else f"on each of {len(plan.devices)} devices"
    print(f'most: {size(peak.device if virtual else plan.total(peak))} while "{peak.name}" runs, {where}')
    print(f"host: up to {size(max(need.host for need in plan.needs))}, and {size(plan.checkpoint)} for a checkpoint")
    if virtual:
        print("virtual devices on the CPU: an accelerator may pad arrays and need other temporaries")
    elif memory is not None:
        lacking = detector.shortage(plan)
        print(lacking or f"it fits: {memory.what} has {size(memory.free + plan.loaded)} for it")


def _report(run_dirs: Sequence[Path], page: Path | None) -> None:
    """Writes the report, or tells how to."""
    from jaxad.report.html import write_report

    if page is None:
        say(f"next: jaxad report {shlex.join(map(str, run_dirs[:8]))}{' ...' if len(run_dirs) > 8 else ''}")
    else:
        say(f"open the report: {write_report(run_dirs, page).absolute().as_uri()}")


if __name__ == "__main__":
    sys.exit(main())
