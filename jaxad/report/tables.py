"""Tables of metrics for the terminal and for Markdown documents."""

import math
import statistics
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from jaxad.files import read_json
from jaxad.metrics.decisions import RATES, Decisions, Rate
from jaxad.metrics.guarantees import statement
from jaxad.metrics.threshold import Threshold
from jaxad.text import printable

ABSENT = "–"
MEAN = "Mean"


class Row(NamedTuple):
    """One row of a table of metrics."""

    method: str
    dataset: str
    category: str
    metrics: Mapping[str, float]
    """Fractions, or NaN if a metric is undefined."""
    reasons: Mapping[str, str] = {}
    """Why a metric is NaN."""
    seed: int = 0
    spread: Mapping[str, float] = {}
    """The standard deviation over seeds, if there are several."""
    threshold: Threshold | None = None
    decisions: Decisions | None = None
    """At the threshold."""


def metric_names(rows: Sequence[Row]) -> list[str]:
    """The names of all metrics in the rows, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def with_means(rows: Sequence[Row]) -> Iterator[tuple[Row, bool]]:
    """Groups rows by method and data set, and adds a mean to each group with several categories.

    Rows that differ only in the seed are merged into one, with mean and standard deviation. The mean over categories is
    unweighted. If a category has no value, the mean is NaN with a reason, since means over different categories are not
    comparable.

    Yields:
        A row, and whether it is a mean over categories.
    """
    for group in _grouped(rows, lambda row: (row.method, row.dataset)):
        categories = _grouped(group, lambda row: row.category)
        for runs in categories:
            seeds_are_unique = len({row.seed for row in runs}) == len(runs)
            yield from ((row, False) for row in ([_over_seeds(runs)] if seeds_are_unique else runs))
        if len(categories) > 1:
            yield _over_seeds([_mean(runs) for runs in _grouped(group, lambda row: row.seed)]), True


def _grouped(rows: Sequence[Row], key: Callable[[Row], Hashable]) -> list[list[Row]]:
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _over_seeds(rows: Sequence[Row]) -> Row:
    """The mean and standard deviation over seeds."""
    if len(rows) == 1:
        return rows[0]
    columns = {name: [row.metrics.get(name, math.nan) for row in rows] for name in metric_names(rows)}
    means = {name: statistics.fmean(column) for name, column in columns.items()}
    spread = {name: statistics.pstdev(column) for name, column in columns.items() if not math.isnan(means[name])}
    reasons = {name: reason for row in rows for name, reason in row.reasons.items()}
    return rows[0]._replace(metrics=means, reasons=reasons, spread=spread)


def _mean(rows: Sequence[Row]) -> Row:
    """The mean over categories."""
    metrics, reasons = {}, {}
    for name in metric_names(rows):
        column = [row.metrics.get(name, math.nan) for row in rows]
        metrics[name] = statistics.fmean(column)
        if math.isnan(metrics[name]):
            missing = [row.category for row, value in zip(rows, column, strict=True) if math.isnan(value)]
            reasons[name] = f"no value for {', '.join(missing)}"
    return rows[0]._replace(category=MEAN, metrics=metrics, reasons=reasons)


def fraction(value: float, spread: float | None = None) -> str:
    """Formats a metric with three decimals, and its standard deviation if there is one. NaN becomes a dash."""
    if math.isnan(value):
        return ABSENT
    return f"{value:.3f}" if spread is None else f"{value:.3f} ± {spread:.3f}"


def metrics_table(rows: Sequence[Row]) -> Table:
    """A table for the terminal, with a row per category, mean rows, and the reasons for missing values as a caption."""
    names = metric_names(rows)
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, show_edge=False, pad_edge=False, header_style="bold")
    for heading in ("method", "dataset", "category"):
        table.add_column(heading, overflow="fold")
    for name in names:
        table.add_column(name.replace("_", "\n", 1), justify="right", no_wrap=True)
    table.caption_justify = "left"
    notes: dict[str, None] = {}
    for row, is_mean in with_means(rows):
        texts = [Text(printable(text)) for text in (row.method, row.dataset, row.category)]
        texts += [Text(fraction(row.metrics.get(name, math.nan), row.spread.get(name))) for name in names]
        table.add_row(*texts, style="bold" if is_mean else None, end_section=is_mean)
        if not is_mean:
            reasons = row.reasons.items()
            notes |= {printable(f"{ABSENT} {row.category} {name}: {reason}"): None for name, reason in reasons}
    seeds = {row.seed for row in rows}
    notes |= {f"± standard deviation over {len(seeds)} seeds": None} if len(seeds) > 1 else {}
    table.caption = Text("\n".join(notes)) if notes else None
    return table


def decisions_table(rows: Sequence[Row]) -> Table | None:
    """A table for the terminal: what each run decides at its threshold, on all defects and on each kind of them.

    Intervals stand below the rates, and what is known about the thresholds in the caption. None without thresholds.
    """
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("at the threshold", overflow="fold")
    for name in RATES:
        table.add_column(name, justify="right", no_wrap=True)
    notes: dict[str, None] = {}
    for row in rows:
        if row.decisions is None or row.threshold is None:
            continue
        run = f"{row.method} {row.category}"
        table.add_row(Text(printable(run)), *(rate_text(getattr(row.decisions, name)) for name in RATES))
        kinds = row.decisions.recall_by_defect
        for kind, rate in kinds.items() if len(kinds) > 1 else ():
            table.add_row(Text(f"  {printable(kind)}"), "", rate_text(rate))
        notes[printable(f"{run}: {row.threshold.source}, {statement(row.threshold)}")] = None
    table.caption_justify = "left"
    table.caption = Text("\n".join(["exact 95 % intervals below the rates", *notes]))
    return table if notes else None


def rate_text(rate: Rate, separator: str = "\n") -> str:
    """A rate and its interval; a dash for a rate of no images."""
    return ABSENT if math.isnan(rate.value) else f"{rate.value:.3f}{separator}{rate.low:.2f}–{rate.high:.2f}"


MARKDOWN_METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AP", "pixel_AUPRO")
OF_EXPERIMENTS = (
    "ablate_",
    "anomalib_",
    "bench_",
    "distill_",
    "epochs_",
    "known_parts",
    "narrow_gap",
    "new_parts",
    "nf_ood",
    "profile_",
    "select_",
    "tails",
)
"""Prefixes of result files that do not come from a recipe."""
Published = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""The published metrics by recipe, as in its result: metric -> {"value", "source"}."""


DAGGER = "†"
STALE = f"{DAGGER} Measured before the method's code or the recipe changed, or before results recorded their code.\n"


def results_markdown(
    results_dir: Path,
    dataset: str | None = None,
    published: Published = MappingProxyType({}),
    stale: Collection[str] = (),
) -> str:
    """A Markdown table of measured and published metrics, from `experiments/results/*.json`.

    It has one row per recipe, ordered by data set, method and backbone. Metrics are means over seeds, with the standard
    deviation if there are several. CPU seconds are those of fitting one category, where it ran on a CPU. A numbered
    list below the table gives the sources of the published metrics.

    Args:
        results_dir: the folder of the results.
        dataset: the only data set to include; None for all.
        published: replaces what the results of these recipes have as published.
        stale: the recipes whose results are older than what they measure; a dagger marks them.

    Raises:
        ValueError: a file is not a result; the message names it.
    """
    rows, sources = [], {}
    for result in read_results(results_dir, dataset, published):
        backbone = result.get("backbone") or ABSENT
        cells = [recipe_cell(result, stale), backbone if isinstance(backbone, str) else ", ".join(backbone)]
        rows.append([*cells, *metric_cells(result, MARKDOWN_METRICS, sources), _cpu_seconds(result)])
    metrics = [heading for name in MARKDOWN_METRICS for heading in (name, "published")]
    table = markdown_table(["recipe", "backbone", *metrics, "fit, CPU seconds"], rows, left=2)
    return table + stale_note(table) + footnotes(sources)


def recipe_cell(result: Mapping[str, Any], stale: Collection[str]) -> str:
    """The name of a result's recipe, with a dagger if it is one of the stale ones."""
    return f"`{result['recipe']}`" + (DAGGER if result["recipe"] in stale else "")


def stale_note(table: str) -> str:
    """What a dagger means, as Markdown below a table that has one."""
    return f"\n{STALE}" if DAGGER in table else ""


def read_results(
    results_dir: Path, dataset: str | None = None, published: Published = MappingProxyType({})
) -> list[dict[str, Any]]:
    """The results of recipes, ordered by data set, method and backbone; arguments and errors as `results_markdown`."""
    paths = (path for path in sorted(results_dir.glob("*.json")) if not path.name.startswith(OF_EXPERIMENTS))
    results = [result for result in map(_read_result, paths) if dataset in (None, result.get("dataset"))]
    results = [one | {"published": published.get(one["recipe"], one.get("published"))} for one in results]
    return sorted(results, key=lambda one: tuple(str(one.get(k)) for k in ("dataset", "method", "backbone", "recipe")))


def metric_cells(result: Mapping[str, Any], names: Sequence[str], sources: dict[str, int]) -> list[str]:
    """The measured and the published value of each metric; new sources are added to `sources`, numbered from 1."""
    cells = []
    for name in names:
        published = (result.get("published") or {}).get(name) or {}
        cells += [_measured(result["metrics"].get(name)), _published(published, sources)]
    return cells


def footnotes(sources: Mapping[str, int]) -> str:
    """The numbered sources, as Markdown below a table."""
    return "".join(["\n", *(f"{number}. {source}\n" for source, number in sources.items())]) if sources else ""


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are left-aligned, the others right-aligned."""
    lines = [headings, ["---"] * left + ["---:"] * (len(headings) - left), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _read_result(path: Path) -> dict[str, Any]:
    result = read_json(path)
    if not isinstance(result, dict) or not {"recipe", "metrics"} <= result.keys():
        raise ValueError(f"{path} lacks recipe or metrics: keep only results of experiments/run.py there")
    return result


def _measured(metric: Mapping[str, float | None] | None) -> str:
    mean, std = (metric or {}).get("mean"), (metric or {}).get("std")
    if mean is None:
        return ABSENT
    return fraction(mean, std or None)


def _cpu_seconds(result: Mapping[str, Any]) -> str:
    seconds = (result.get("seconds") or {}).get("cpu_fit") if result.get("device") == "cpu" else None
    return ABSENT if seconds is None else f"{seconds:.0f}"


def _published(metric: Mapping[str, Any], sources: dict[str, int]) -> str:
    if metric.get("value") is None:
        return ABSENT
    number = sources.setdefault(metric["source"], len(sources) + 1) if metric.get("source") else None
    return fraction(metric["value"]) + (f" [{number}]" if number else "")
