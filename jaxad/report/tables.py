"""Tables of metrics, for the terminal and for the README."""

import math
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from jaxad.files import read_json

ABSENT = "–"
MEAN = "Mean"


class Row(NamedTuple):
    """One line of a table of metrics."""

    method: str
    dataset: str
    category: str
    metrics: Mapping[str, float]
    """Fractions; NaN where a metric is undefined."""
    reasons: Mapping[str, str] = {}
    """Why a metric is NaN."""
    seed: int = 0
    spread: Mapping[str, float] = {}
    """The standard deviation over seeds, where there are several."""


def metric_names(rows: Sequence[Row]) -> list[str]:
    """Every metric of the rows once, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def with_means(rows: Sequence[Row]) -> Iterator[tuple[Row, bool]]:
    """The rows grouped by method and data set, each group of several categories followed by its mean, marked True.

    Rows that differ in the seed alone become one, with mean and standard deviation. The mean over categories is
    unweighted; it is NaN, with the reason, as soon as one category has no value, since it would otherwise not compare
    with the mean of another method.
    """
    for group in _grouped(rows, lambda row: (row.method, row.dataset)):
        categories = _grouped(group, lambda row: row.category)
        for same in categories:
            once = len({row.seed for row in same}) == len(same)
            yield from ((row, False) for row in ([_over_seeds(same)] if once else same))
        if len(categories) > 1:
            yield _over_seeds([_mean(same) for same in _grouped(group, lambda row: row.seed)]), True


def _grouped(rows: Sequence[Row], key: Callable[[Row], Hashable]) -> list[list[Row]]:
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _over_seeds(rows: Sequence[Row]) -> Row:
    if len(rows) == 1:
        return rows[0]
    columns = {name: [row.metrics.get(name, math.nan) for row in rows] for name in metric_names(rows)}
    means = {name: statistics.fmean(column) for name, column in columns.items()}
    spread = {name: statistics.pstdev(column) for name, column in columns.items() if not math.isnan(means[name])}
    reasons = {name: reason for row in rows for name, reason in row.reasons.items()}
    return rows[0]._replace(metrics=means, reasons=reasons, spread=spread)


def _mean(rows: Sequence[Row]) -> Row:
    """Over categories."""
    metrics, reasons = {}, {}
    for name in metric_names(rows):
        column = [row.metrics.get(name, math.nan) for row in rows]
        metrics[name] = statistics.fmean(column)
        if math.isnan(metrics[name]):
            missing = [row.category for row, value in zip(rows, column, strict=True) if math.isnan(value)]
            reasons[name] = f"no value for {', '.join(missing)}"
    return rows[0]._replace(category=MEAN, metrics=metrics, reasons=reasons)


def fraction(value: float, spread: float | None = None) -> str:
    """A metric with three decimals, and its standard deviation if there is one; a dash for NaN."""
    if math.isnan(value):
        return ABSENT
    return f"{value:.3f}" if spread is None else f"{value:.3f} ± {spread:.3f}"


def metrics_table(rows: Sequence[Row]) -> Table:
    """A table for the terminal: a line per category, a Mean line under several, below it why a dash is a dash."""
    names = metric_names(rows)
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, show_edge=False, pad_edge=False, header_style="bold")
    for heading in ("method", "dataset", "category"):
        table.add_column(heading, overflow="fold")
    for name in names:
        table.add_column(name.replace("_", "\n", 1), justify="right", no_wrap=True)
    table.caption_justify = "left"
    notes: dict[str, None] = {}
    for row, is_mean in with_means(rows):
        texts = [Text(text) for text in (row.method, row.dataset, row.category)]
        texts += [Text(fraction(row.metrics.get(name, math.nan), row.spread.get(name))) for name in names]
        table.add_row(*texts, style="bold" if is_mean else None, end_section=is_mean)
        if not is_mean:
            notes |= {f"{ABSENT} {row.category} {name}: {reason}": None for name, reason in row.reasons.items()}
    seeds = {row.seed for row in rows}
    notes |= {f"± standard deviation over {len(seeds)} seeds": None} if len(seeds) > 1 else {}
    table.caption = Text("\n".join(notes)) if notes else None
    return table


MARKDOWN_METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AP", "pixel_AUPRO")


APART = ("ablate_", "bench_", "distill_", "epochs_", "nf_ood", "profile_", "select_")
"""Files among the results that are not of a recipe."""


def results_markdown(results_dir: Path, dataset: str | None = None) -> str:
    """A table of measured and published numbers, of all data sets or of one, from `experiments/results/*.json`.

    Those of benchmarks (`bench_*`), of the distillation (`distill_*`) and on foreign images (`nf_ood`) are not in it.

    One line per recipe, ordered by data set, method and backbone; means over seeds with their standard deviation where
    there were several; the sources of the published numbers as a list below.

    Raises:
        ValueError: a file that is not a result; the message names it.
    """
    paths = (path for path in sorted(results_dir.glob("*.json")) if not path.name.startswith(APART))
    results = [result for result in map(_read_result, paths) if dataset in (None, result.get("dataset"))]
    results.sort(key=lambda result: tuple(str(result.get(key)) for key in ("dataset", "method", "backbone", "recipe")))
    headings = ["recipe", "backbone"]
    for name in MARKDOWN_METRICS:
        headings += [name, "published"]
    rows: list[list[str]] = []
    sources: dict[str, int] = {}
    for result in results:
        backbone = result.get("backbone") or ABSENT
        cells = [f"`{result['recipe']}`", backbone if isinstance(backbone, str) else ", ".join(backbone)]
        for name in MARKDOWN_METRICS:
            published = (result.get("published") or {}).get(name) or {}
            cells += [_measured(result["metrics"].get(name)), _published(published, sources)]
        rows.append(cells)
    footnotes = "".join(f"{number}. {source}\n" for source, number in sources.items())
    return markdown_table(headings, rows, left=2) + (f"\n{footnotes}" if footnotes else "")


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table in Markdown, its first columns on the left and the others on the right."""
    lines = [headings, ["---"] * left + ["---:"] * (len(headings) - left), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _read_result(path: Path) -> dict[str, Any]:
    result = read_json(path)
    if not isinstance(result, dict) or not {"recipe", "metrics"} <= result.keys():
        raise ValueError(f"{path} has no recipe and metrics: only results of experiments/run.py belong there")
    return result


def _measured(metric: Mapping[str, float | None] | None) -> str:
    mean, std = (metric or {}).get("mean"), (metric or {}).get("std")
    if mean is None:
        return ABSENT
    return fraction(mean, std or None)


def _published(metric: Mapping[str, Any], sources: dict[str, int]) -> str:
    if metric.get("value") is None:
        return ABSENT
    number = sources.setdefault(metric["source"], len(sources) + 1) if metric.get("source") else None
    return fraction(metric["value"]) + (f" [{number}]" if number else "")
