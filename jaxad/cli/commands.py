"""The commands."""

import dataclasses
import functools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, UseAppendAction, arg

import jaxad
from jaxad.artifact import read_description
from jaxad.backbones import available, fetch, import_file
from jaxad.cli.estimating import estimate  # noqa: F401  (`run` finds it)
from jaxad.cli.listing import print_table
from jaxad.cli.main import one_line
from jaxad.cli.options import (
    DATA,
    BenchmarkData,
    Data,
    FitData,
    Runs,
    Source,
    method_options,
    settings_of,
    sweep_of,
)
from jaxad.data import ImageError, Split, open_data
from jaxad.data.dataset import check_normals
from jaxad.data.depth import usual_bits
from jaxad.data.ignore import regions
from jaxad.driver import distributed
from jaxad.driver.embedding import EmbeddingCache
from jaxad.driver.execution import Checkpoint, Execution
from jaxad.driver.mesh import is_first
from jaxad.learning import Sweep, load_frozen
from jaxad.metrics.guarantees import shortfall
from jaxad.progress import Bars, be_silent, say
from jaxad.report.html import write_report
from jaxad.report.runs import read_recipe
from jaxad.report.tables import Row, decisions_table, metrics_table
from jaxad.runs import directory
from jaxad.runs.benchmarking import measure, unsuited
from jaxad.runs.evaluating import evaluate_group, evaluate_runs, evaluate_unified
from jaxad.runs.fitting import Assignment, FittedGroup, Run, assign, fit_all, shared_caches
from jaxad.runs.scoring import open_split, score_run
from jaxad.settings import Settings
from jaxad.text import printable


def run(name: str, argv: list[str], arguments: dict[str, Any]) -> int:
    """Runs the function of that name and returns the exit code; `argv` is the command line, for the record."""
    recorded = {"argv": argv} if name in DATA else {}
    try:
        return globals()[name](**recorded, **arguments) or 0
    except ImageError as error:
        options = vars(arguments["data"]) if "data" in arguments else arguments
        if options.get("skip_broken", True):
            raise
        raise ImageError(f"{error}, or add --skip-broken to go on without such images") from error


def fit(argv: list[str], data: FitData, options: dict[str, Any], hyperparameters: dict[str, Any]) -> None:
    """Learn from normal images."""
    _join(data)
    settings = settings_of(data.method, data.preset, options | hyperparameters)
    bits, opened = _open(data, settings)
    settings = dataclasses.replace(settings, bits=bits)
    assignments = _assign(settings, opened, data)
    fitted = _fit(assignments, data, ["fit", *argv], load_frozen(settings))
    run_dirs = [run.directory for group in fitted for run in group.runs]
    saved = shlex.quote(str(run_dirs[0] if len(run_dirs) == 1 else run_dirs[0].parent))
    following = f"evaluate {saved}" if any(split.test for split in opened.values()) else f"score {saved} NEW_IMAGES"
    say(f"saved in {saved}; next: jaxad {following}")


def benchmark(argv: list[str], data: BenchmarkData, options: dict[str, Any]) -> int:
    """Fit and evaluate several methods on every category, side by side."""
    if data.seeds < 1:
        raise ValueError(f"seeds must be 1 or more, got {data.seeds}")
    sweep = Sweep(*sweep_of(data.sweep)) if data.sweep else None
    _join(data)
    candidates: list[Settings] = []
    refusals: dict[str, Exception] = {}
    for name in dict.fromkeys(data.methods or jaxad.methods.names()):
        jaxad.methods.factory(name)  # a name that is none is no reason to leave it out
        try:
            candidates.append(settings_of(name, data.preset, options | vars(method_options(name)())))
        except ValueError as error:
            refusals[name] = error
    if not candidates:
        raise next(iter(refusals.values()))
    bits, opened = _open(data, candidates[0])
    candidates = [dataclasses.replace(settings, bits=bits) for settings in candidates]
    untested = [category for category, split in opened.items() if split.test is None]
    if untested:
        raise ValueError(f"a benchmark needs test images, got none for {', '.join(untested)} of {data.source}")
    assigned = [_assign(settings, opened, data, data.seeds, sweep) for settings in candidates]
    weights: dict[Any, Any] = {}
    refusals |= unsuited(candidates, [split.train for split in opened.values()], weights)
    if all(settings.method in refusals for settings in candidates):
        raise next(iter(refusals.values()))
    for name, error in refusals.items():
        say(f"without {name}: {one_line(error)}")

    def run(settings: Settings, assignments: list[Assignment], cache: EmbeddingCache | None) -> dict[Path, Row]:
        groups = _fit(assignments, data, ["benchmark", *argv], weights[settings.backbone], cache, sweep)
        parts = [evaluate_group(group, opened, source=data.source, cache=cache) for group in groups]
        return {path: row for part in parts for path, row in part.items()}

    kept = [i for i, settings in enumerate(candidates) if settings.method not in refusals]
    caches = shared_caches([candidates[i] for i in kept])
    runs = {
        candidates[i].method: functools.partial(run, candidates[i], assigned[i], cache)
        for i, cache in zip(kept, caches, strict=True)
    }
    rows, errors = measure(runs, _say_error)
    if rows:  # only the first of several processes has them
        try:
            print_table(metrics_table(sorted(rows.values(), key=lambda row: row.method)))
        finally:
            _report(list(rows), data.report)
    return int(bool(errors or (refusals and data.methods)))


def score(
    run: Annotated[Positional[Path], arg(metavar="RUN_DIR")],
    source: Source,
    category: str | None = None,
    output: Path | None = None,
    overlays: bool = False,
    maps: bool = False,
    ignore: UseAppendAction[tuple[Path, ...]] = (),
    pages: bool = False,
    weights: UseAppendAction[tuple[Path, ...]] = (),
    overwrite: bool = False,
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
        ignore: Masks of what to ignore in every image, with a margin around it, besides what was ignored in fit.
        pages: Read all pages or frames of a file, not only the first.
        weights: Where the backbone's weights are now, if not where they were.
        overwrite: Replace scores of other images, or of another model, in the output folder.
    """
    path, model = Path(source), directory.version(run)
    detector = jaxad.load(run, weights=weights or None)
    fitted = read_recipe(run).get("category")
    reading: dict[str, Any] = {"any_folder": True, "pages": pages, "broken": "keep"}
    split = open_split(source, detector, asked=category, fitted=fitted, **reading)
    output = output or directory.scores_folder(run, path.resolve().name if path.exists() else source)
    root = (path if path.is_dir() else path.parent) if path.exists() else None
    data = (split.test or split.train).also_ignoring(regions(ignore))
    options = {"labeled": split.test is not None, "overlays": overlays, "maps": maps}
    images = {"source": _place(source), "category": data.category}
    with directory.scoring(output, run, model, images, overwrite) as stage:
        anomalous, errors = score_run(detector, data, stage, root=root, **options)
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
    ignore: UseAppendAction[tuple[Path, ...]] = (),
    weights: UseAppendAction[tuple[Path, ...]] = (),
    oracle: bool = False,
    skip_broken: bool = False,
    report: Path | None = None,
) -> int:
    """Score the test images of fitted runs, print the metrics and keep them for the report.

    Damaged runs are told before any work. What else keeps one of several from being evaluated does not cost the
    others, and the exit code is 1.

    Args:
        run: Run directories, or folders of them.
        source: Labeled images; None: those of the data set that the run was fitted on.
        category: Product class of the source; None: the run's.
        mask_threshold: A mask pixel counts where it is above; None: as in fit.
        ignore: Masks of what to ignore in every image, with a margin around it, besides what was ignored in fit.
        weights: Where the backbone's weights are now, if not where they were.
        oracle: Choose the thresholds on the test set itself, and mark them so.
        skip_broken: Leave out images that cannot be read, and name them; also where fit did so.
        report: Also write an HTML report to this file.
    """

    def one(run_dir: Path) -> dict[Path, Row]:
        version = directory.version(run_dir)
        detector, recipe = jaxad.load(run_dir, weights=weights or None), read_recipe(run_dir)
        tested = source or recipe.get("source")
        if tested is None:
            raise ValueError(f"{run_dir} does not say what it was fitted on: give the labeled images with --source")
        threshold = recipe.get("mask_threshold") if mask_threshold is None else mask_threshold
        options: dict[str, Any] = {"mask_threshold": threshold, "group_by": None if source else recipe.get("group_by")}
        options["pages"] = bool(recipe.get("pages"))
        options["broken"] = "skip" if skip_broken or recipe.get("skip_broken") else "refuse"
        fitted = recipe.get("category")
        single = Run(detector, fitted or "", run_dir, version=version)
        if recipe.get("unified"):
            opened = open_data(tested, category=category, preprocess=detector.settings.preprocess, **options)
            opened = {
                name: split._replace(test=split.test.also_ignoring(regions(ignore)))
                for name, split in opened.items()
                if split.test is not None
            }
            return evaluate_unified(single, opened, source=tested, whole=category is None, oracle=oracle)
        split = open_split(tested, detector, asked=category, fitted=fitted, **options)
        if split.test is None:
            raise ValueError(
                f"{tested} has no test images to evaluate on: score images with `jaxad score {run_dir} IMAGES`"
            )
        test = split.test.also_ignoring(regions(ignore))
        [row] = evaluate_runs([single], [test], source=tested, oracle=oracle)
        return {run_dir: row}

    run_dirs = directory.find(run, "model.json")
    for run_dir in run_dirs[1:]:
        read_description(run_dir)
        read_recipe(run_dir)
    evaluations = {str(run_dir): functools.partial(one, run_dir) for run_dir in run_dirs}
    rows, errors = measure(evaluations, lambda *_: None)
    for name, error in errors.items():
        _say_error(name, error)
    lacking = {row.category: shortfall(row.threshold) for row in rows.values() if row.threshold}
    try:
        print_table(metrics_table(list(rows.values())))
        if decided := decisions_table(list(rows.values())):
            print_table(decided)
    finally:
        for category, line in lacking.items():
            if line:
                say(f"{category}: {line}")
        _report(list(rows), report)
    return int(bool(errors))


def threshold(
    run: Annotated[Positional[Path], arg(metavar="RUN_DIR")], image: float | None = None, pixel: float | None = None
) -> None:
    """Set the thresholds of a fitted run by hand.

    Args:
        run: A run directory, or what `Detector.save` wrote.
        image: Image scores above it are anomalous; None keeps the threshold.
        pixel: Pixel scores above it are anomalous; None keeps the threshold.
    """
    changed = directory.set_thresholds(run, image, pixel)._asdict().items()
    values = [f"{kind} {'none' if pair is None else f'{pair.value:.4g}, {pair.source}'}" for kind, pair in changed]
    say(f"thresholds of {run}: {'; '.join(values)}")


def report(run: Runs, output: Path = Path("report.html")) -> None:
    """Write one HTML page about fitted and evaluated runs.

    Args:
        run: Run directories, or folders of them.
        output: The file to write.
    """
    _report(directory.find(run, "recipe.json"), output)


def weights_list() -> None:
    """List the weights known by name and where they are."""
    table = Table("name", "short", "state", "file or address")
    for entry in available():
        location = Text(printable(entry.path or entry.url or "import a file of it"))
        table.add_row(entry.name, entry.plain, entry.state, location, style="bold" if entry.path else None)
    print_table(table)


def weights_fetch(name: Annotated[Positional[str], arg(metavar="NAME")], trust: bool = False) -> None:
    """Download official weights into the cache; run it again to resume.

    Args:
        name: A name in `jaxad weights list`.
        trust: Accept weights whose sha256 only the server knows. It is kept, and holds from then on.
    """
    with Bars(name, "MB", 1e6) as bars:
        path = fetch(name, lambda done, total: bars("fetch", done, total), trust)
    say(f"{name} is in {path}")


def weights_import(file: Annotated[Positional[Path], arg(metavar="FILE")], name: str | None = None) -> None:
    """Copy a safetensors file of your own into the cache, after checking it.

    Args:
        file: Safetensors with timm's or torchvision's names.
        name: The backbone that it is for; None takes it from the file's name.
    """
    say(f"imported as {import_file(file, name)}")


def _say_error(name: str, error: Exception) -> None:
    say(f"jaxad: error: {name}: {one_line(error)}")


def _place(source: str) -> str:
    """A source, from wherever it is looked for."""
    return str(Path(source).absolute()) if Path(source).exists() else source


def _open(data: Data, settings: Settings) -> tuple[int | None, dict[str, Split]]:
    """The depth of 16-bit images, and the data."""
    options: dict[str, Any] = {"mask_threshold": data.mask_threshold, "group_by": data.group_by, "pages": data.pages}
    options["broken"] = "skip" if data.skip_broken else "refuse"
    opened = open_data(data.source, category=data.category, preprocess=settings.preprocess, **options)
    check_normals(*(split.train for split in opened.values()))
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


def _assign(
    settings: Settings, opened: dict[str, Any], data: Data, seeds: int = 1, sweep: Sweep | None = None
) -> list[Assignment]:
    trains = {category: split.train for category, split in opened.items()}
    where: dict[str, Any] = dict(source=_place(data.source), output=data.output, overwrite=data.overwrite)
    return assign(settings, trains, seeds=seeds, unified=data.unified, sweep=sweep, **where)


def _fit(
    assignments: list[Assignment],
    data: Data,
    command: list[str],
    frozen: Any,
    cache: EmbeddingCache | None = None,
    sweep: Sweep | None = None,
) -> list[FittedGroup]:
    """Fits all categories and seeds."""
    read = {"source": _place(data.source), "mask_threshold": data.mask_threshold, "group_by": data.group_by}
    read |= {"pages": data.pages, "skip_broken": data.skip_broken}
    checkpoint = Checkpoint(data.output, data.checkpoint_seconds)
    return fit_all(
        assignments,
        recipe=read | {"command": shlex.join(["jaxad", *command])},
        frozen=frozen,
        devices=None if data.distributed else data.devices,
        execution=Execution(classes_per_step=data.classes_per_step, cache=cache, checkpoint=checkpoint),
        sweep=sweep,
        overwrite=data.overwrite,
    )


def _report(run_dirs: Sequence[Path], page: Path | None) -> None:
    """Writes the report, or prints the command that does."""
    if page is None:
        say(f"next: jaxad report {shlex.join(map(str, run_dirs[:8]))}{' ...' if len(run_dirs) > 8 else ''}")
    else:
        say(f"open the report: {write_report(run_dirs, page).absolute().as_uri()}")
