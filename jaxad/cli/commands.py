"""The commands."""

import dataclasses
import inspect
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.table import Column, Table
from tyro.conf import Positional, UseAppendAction, arg

import jaxad
from jaxad.backbones import available, fetch, import_file
from jaxad.cli.listing import print_table
from jaxad.cli.main import COMMANDS
from jaxad.cli.options import (
    BenchmarkData,
    Data,
    EstimateData,
    FitData,
    Runs,
    Source,
    call,
    method_options,
    option_before,
    parse,
    settings_of,
    settings_options,
    sweep_of,
)
from jaxad.data import ImageError, Split, open_data
from jaxad.data.dataset import check_normals
from jaxad.data.depth import usual_bits
from jaxad.driver import distributed, memory
from jaxad.driver.embedding import EmbeddingCache
from jaxad.driver.execution import Checkpoint, Execution
from jaxad.driver.mesh import is_first
from jaxad.driver.plan import Plan, size
from jaxad.learning import Sweep, abstract_frozen, check_auxiliary, load_frozen, shortage
from jaxad.metrics.guarantees import shortfall
from jaxad.progress import Bars, be_silent, say
from jaxad.report.html import write_report
from jaxad.report.tables import Row, decisions_table, metrics_table
from jaxad.runs import directory
from jaxad.runs.evaluating import evaluate_group, evaluate_runs, evaluate_unified
from jaxad.runs.fitting import FittedGroup, Run, fit_all, plan_all, shared_caches
from jaxad.runs.scoring import open_split, score_run
from jaxad.settings import Settings

PLAN_COLUMNS = ("weights", "state", "images", "temporaries", "each device", "host")
"""What `jaxad estimate` prints of every program."""


def run(name: str, argv: list[str]) -> int:
    """Runs the command of that name; the exit code. Warnings are lines."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {' '.join(str(message).split())}")
        try:
            if name in ("score", "evaluate", "report"):
                return call(globals()[name], prog=f"jaxad {name}", args=argv) or 0
            return globals()[name](argv) or 0
        except ImageError as error:
            raise ImageError(f"{error}, or add --skip-broken to go on without such images") from error


def fit(argv: list[str]) -> None:
    """Learn from normal images."""
    name = option_before(argv, "method", FitData.method)
    groups = {"data": FitData, "settings": settings_options(), name: method_options(name)}
    data, options, hyperparameters = parse("fit", COMMANDS["fit"], argv, groups)
    _join(data)
    settings = settings_of(name, data.preset, options | hyperparameters)
    bits, opened = _open(data, settings)
    settings = dataclasses.replace(settings, bits=bits)
    fitted = _fit(settings, opened, data, ["fit", *argv], load_frozen(settings))
    run_dirs = [run.directory for group in fitted for run in group.runs]
    saved = shlex.quote(str(run_dirs[0] if len(run_dirs) == 1 else run_dirs[0].parent))
    following = f"evaluate {saved}" if any(split.test for split in opened.values()) else f"score {saved} NEW_IMAGES"
    say(f"saved in {saved}; next: jaxad {following}")


def benchmark(argv: list[str]) -> None:
    """Fit and evaluate several methods on every category, side by side."""
    data, options = parse(
        "benchmark", COMMANDS["benchmark"], argv, {"data": BenchmarkData, "settings": settings_options()}
    )
    if data.seeds < 1:
        raise ValueError(f"seeds must be 1 or more, got {data.seeds}")
    sweep = Sweep(*sweep_of(data.sweep)) if data.sweep else None
    _join(data)
    candidates, refusals = [], {}
    for name in data.methods or jaxad.methods.names():
        try:
            settings = settings_of(name, data.preset, options | vars(method_options(name)()))
            check_auxiliary(settings, settings.build(settings.usual_size()))
            candidates.append(settings)
        except ValueError as error:
            if data.methods:
                raise
            refusals[name] = error
    if not candidates:
        raise next(iter(refusals.values()))
    for name, error in refusals.items():
        say(f"without {name}: {error}")
    bits, opened = _open(data, candidates[0])
    candidates = [dataclasses.replace(settings, bits=bits) for settings in candidates]
    untested = [category for category, split in opened.items() if split.test is None]
    if untested:
        raise ValueError(f"a benchmark needs test images, got none for {', '.join(untested)} of {data.source}")
    weights: dict[tuple[str, ...], Any] = {}
    rows: dict[Path, Row] = {}
    for settings, cache in zip(candidates, shared_caches(candidates), strict=True):
        if settings.backbone not in weights:  # methods that share a cache share the weights, too
            weights[settings.backbone] = load_frozen(settings)
        frozen = weights[settings.backbone]
        for group in _fit(settings, opened, data, ["benchmark", *argv], frozen, data.seeds, cache, sweep):
            rows |= evaluate_group(group, opened, source=data.source, cache=cache)
    if rows:  # only the first of several processes has them
        print_table(metrics_table(sorted(rows.values(), key=lambda row: row.method)))
        _report(list(rows), data.report)


def estimate(argv: list[str]) -> None:
    """Print how much memory a fit needs, without fitting."""
    name = argv[0] if argv and not argv[0].startswith("-") else FitData.method
    groups = {"data": EstimateData, "settings": settings_options(), name: method_options(name)}
    data, options, hyperparameters = parse("estimate", COMMANDS["estimate"], argv, groups)
    settings = settings_of(name, data.preset, options | hyperparameters)
    opened = open_data(data.data, category=data.category, preprocess=settings.preprocess)
    for split in opened.values():
        check_normals(split.train)
    try:
        frozen = load_frozen(settings)
    except FileNotFoundError:
        if any(settings.weights):
            raise
        frozen = abstract_frozen(settings)
    if data.devices > jax.device_count():
        say(f"{jax.device_count()} of {data.devices} devices are here: compiling for virtual ones on the CPU")
        _on_virtual_devices(data.devices, ["estimate", *argv])
        return
    trains = {category: split.train for category, split in opened.items()}
    execution = Execution(classes_per_step=data.classes_per_step)
    options = dict(frozen=frozen, unified=data.unified, devices=data.devices, execution=execution)
    for plan in plan_all(settings, trains, **options):
        _print_plan(plan, settings)


def score(
    run: Annotated[Positional[Path], arg(metavar="RUN_DIR")],
    source: Source,
    category: str | None = None,
    output: Path | None = None,
    overlays: bool = False,
    maps: bool = False,
    pages: bool = False,
    weights: UseAppendAction[tuple[Path, ...]] = (),
) -> int:
    """Score images with a fitted run; heat maps on request.

    Images that cannot be read are listed with their errors, and the exit code is 1.

    Args:
        run: A run directory, or what `Detector.save` wrote.
        source: A folder, one image, a CSV file, tfds:NAME, or demo; of a data set with a test split, the test images.
        category: Product class of the source; None: the run's.
        output: Folder of scores.csv and scores.jsonl; None: RUN_DIR/scores/NAME_OF_SOURCE.
        overlays: Write PNGs with the heat map over the image to OUTPUT/overlays. The colors begin at the median normal
            pixel and reach the pixel threshold halfway, so they mean the same in all images.
        maps: Write the raw heat maps at the original resolution as float32 TIFF to OUTPUT/maps.
        pages: Read all pages or frames of a file, not only the first.
        weights: Where the backbone's weights are now, if not where they were.
    """
    path = Path(source)
    detector = jaxad.load(run, weights=weights or None)
    fitted = directory.read_recipe(run).get("category")
    reading: dict[str, Any] = {"any_folder": True, "pages": pages, "broken": "keep"}
    split = open_split(source, detector, asked=category, fitted=fitted, **reading)
    output = output or run / "scores" / directory.segment(path.resolve().stem if path.exists() else source)
    root = (path if path.is_dir() else path.parent) if path.exists() else None
    data, options = split.test or split.train, {"labeled": split.test is not None, "overlays": overlays, "maps": maps}
    anomalous, errors = score_run(detector, data, output, root=root, **options)
    threshold = detector.image_threshold
    result = "without a threshold" if threshold is None else f"{anomalous} above the threshold {threshold.value:.4g}"
    folders = [f", {name}/" for name in ("overlays", "maps") if options[name]]
    n = len(data) - len(errors)
    say(f"{n} images scored, {result}; written to {output}: scores.csv, scores.jsonl{''.join(folders)}")
    if errors:
        say(f"{len(errors)} of {len(data)} images cannot be read, as scores.csv says, the first is: {errors[0]}")
    return int(bool(errors))


def evaluate(
    run: Runs,
    source: str | None = None,
    category: str | None = None,
    mask_threshold: float | None = None,
    weights: UseAppendAction[tuple[Path, ...]] = (),
    oracle: bool = False,
    skip_broken: bool = False,
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
        skip_broken: Leave out images that cannot be read, and name them; also where fit did so.
        report: Also write an HTML report to this file.
    """
    rows: dict[Path, Row] = {}
    for run_dir in directory.find(run, "model.json"):
        detector, recipe = jaxad.load(run_dir, weights=weights or None), directory.read_recipe(run_dir)
        tested = source or recipe.get("source")
        if tested is None:
            raise ValueError(f"{run_dir} does not say what it was fitted on: give the labeled images with --source")
        threshold = recipe.get("mask_threshold") if mask_threshold is None else mask_threshold
        options: dict[str, Any] = {"mask_threshold": threshold, "group_by": None if source else recipe.get("group_by")}
        options["pages"] = bool(recipe.get("pages"))
        options["broken"] = "skip" if skip_broken or recipe.get("skip_broken") else "refuse"
        fitted = recipe.get("category")
        single = Run(detector, fitted or "", run_dir)
        if recipe.get("unified") and category is None:
            opened = open_data(tested, preprocess=detector.settings.preprocess, **options)
            opened = {category: split for category, split in opened.items() if split.test is not None}
            rows |= evaluate_unified(single, opened, source=tested, oracle=oracle)
            continue
        split = open_split(tested, detector, asked=category, fitted=fitted, **options)
        if split.test is None:
            raise ValueError(
                f"{tested} has no test images to evaluate on: score images with `jaxad score {run_dir} IMAGES`"
            )
        [rows[run_dir]] = evaluate_runs([single], [split.test], source=tested, oracle=oracle)
    print_table(metrics_table(list(rows.values())))
    if decided := decisions_table(list(rows.values())):
        print_table(decided)
    lacking = {row.category: shortfall(row.threshold) for row in rows.values() if row.threshold}
    for category, line in lacking.items():
        if line:
            say(f"{category}: {line}")
    _report(list(rows), report)


def report(run: Runs, output: Path = Path("report.html")) -> None:
    """Write one HTML page about fitted and evaluated runs.

    Args:
        run: Run directories, or folders of them.
        output: The file to write.
    """
    _report(directory.find(run, "recipe.json"), output)


def weights(argv: list[str]) -> None:
    """Manage pretrained weights: list, fetch NAME, import FILE."""
    commands = {"list": weights_list, "fetch": weights_fetch, "import": weights_import}
    if not argv or argv[0] not in (*commands, "-h", "--help"):
        raise ValueError(f"weights wants one of {', '.join(commands)}, got {argv[0] if argv else 'nothing'}")
    if argv[0] in commands:
        call(commands[argv[0]], prog=f"jaxad weights {argv[0]}", args=argv[1:])
    else:
        description = inspect.getdoc(weights)
        tyro.extras.subcommand_cli_from_dict(commands, prog="jaxad weights", description=description, args=argv)


def weights_list() -> None:
    """List the weights known by name and where they are."""
    table = Table("name", "short", "state", "file or address")
    for entry in available():
        location = str(entry.path or entry.url or "import a file of it")
        table.add_row(entry.name, entry.plain, entry.state, location, style="bold" if entry.path else None)
    print_table(table)


def weights_fetch(name: Annotated[Positional[str], arg(metavar="NAME")]) -> None:
    """Download official weights into the cache; run it again to resume.

    Args:
        name: A name in `jaxad weights list`.
    """
    with Bars(name, "MB", 1e6) as bars:
        path = fetch(name, lambda done, total: bars("fetch", done, total))
    say(f"{name} is in {path}")


def weights_import(file: Annotated[Positional[Path], arg(metavar="FILE")], name: str | None = None) -> None:
    """Copy a safetensors file of your own into the cache, after checking it.

    Args:
        file: Safetensors with timm's or torchvision's names.
        name: The backbone that it is for; None takes it from the file's name.
    """
    say(f"imported as {import_file(file, name)}")


def _open(data: Data, settings: Settings) -> tuple[int | None, dict[str, Split]]:
    """The depth of 16-bit images, and the data."""
    options: dict[str, Any] = {"mask_threshold": data.mask_threshold, "group_by": data.group_by, "pages": data.pages}
    options["broken"] = "skip" if data.skip_broken else "refuse"
    opened = open_data(data.source, category=data.category, preprocess=settings.preprocess, **options)
    for split in opened.values():
        check_normals(split.train)
    bits, warning = usual_bits([split.train for split in opened.values()])
    if warning:
        say(f"warning: {warning}")
    return bits, {key: Split(a.with_bits(bits), b and b.with_bits(bits)) for key, (a, b) in opened.items()}


def _join(data: Data) -> None:
    """Joins the other processes, if there are any; all but the first stay silent."""
    address = (data.coordinator, data.num_processes, data.process_id)
    if not data.distributed:
        if any(value is not None for value in address):
            raise ValueError("--coordinator, --num-processes and --process-id need --distributed: add it")
        return
    distributed.join(*address)
    if not is_first():
        be_silent()


def _fit(
    settings: Settings,
    opened: dict[str, Any],
    data: Data,
    argv: list[str],
    frozen: Any,
    seeds: int = 1,
    cache: EmbeddingCache | None = None,
    sweep: Sweep | None = None,
) -> list[FittedGroup]:
    """Fits all categories and seeds."""
    source = str(Path(data.source).absolute()) if Path(data.source).exists() else data.source
    read = {"source": source, "mask_threshold": data.mask_threshold, "group_by": data.group_by, "pages": data.pages}
    read |= {"skip_broken": data.skip_broken}
    recipe = read | {"command": shlex.join(["jaxad", *argv])}
    checkpoint = Checkpoint(data.output, data.checkpoint_seconds)
    return fit_all(
        settings,
        {category: split.train for category, split in opened.items()},
        output=data.output,
        recipe=recipe,
        frozen=frozen,
        seeds=seeds,
        unified=data.unified,
        devices=None if data.distributed else data.devices,
        execution=Execution(classes_per_step=data.classes_per_step, cache=cache, checkpoint=checkpoint),
        sweep=sweep,
    )


def _on_virtual_devices(devices: int, argv: Sequence[str]) -> None:
    """Runs a command in another process, with that many virtual devices of the CPU."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
    command = [sys.executable, "-m", "jaxad", *argv]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, end="")
    if done.returncode:
        sys.exit(done.returncode)


def _print_plan(plan: Plan, settings: Settings) -> None:
    """The table of what is in memory while each program runs, and what follows from it."""
    virtual = plan.shared and len(plan.devices) > 1
    table = Table("while this runs", *(Column(name, justify="right") for name in PLAN_COLUMNS))
    for need in plan.needs:
        parts = (need.weights, need.state, need.batch, need.temporaries, need.device, need.host)
        table.add_row(need.name, *map(size, parts), style="bold" if need is plan.peak else None)
    table.add_section()
    table.add_row("the model", "", size(plan.model), "", "", size(plan.model), "")
    print_table(table)
    peak, free = plan.peak, memory.available(plan.devices)
    place = "device and host together" if plan.shared and not virtual else f"on each of {len(plan.devices)} devices"
    print(f'most: {size(peak.device if virtual else plan.total(peak))} while "{peak.name}" runs, {place}')
    print(f"host: up to {size(max(need.host for need in plan.needs))}, and {size(plan.checkpoint)} for a checkpoint")
    if virtual:
        print("virtual devices on the CPU: an accelerator may pad arrays and need other temporaries")
    elif free is not None:
        lacking = shortage(settings, plan)
        print(lacking or f"it fits: {free.owner} has {size(free.free + plan.loaded)} for it")


def _report(run_dirs: Sequence[Path], page: Path | None) -> None:
    """Writes the report, or prints the command that does."""
    if page is None:
        say(f"next: jaxad report {shlex.join(map(str, run_dirs[:8]))}{' ...' if len(run_dirs) > 8 else ''}")
    else:
        say(f"open the report: {write_report(run_dirs, page).absolute().as_uri()}")
