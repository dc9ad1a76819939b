"""Writes a self-contained HTML report on one or several runs, with inline images and charts and without scripts."""

import base64
import datetime
import importlib.resources
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxad.files import replacing
from jaxad.metrics.decisions import RATES, decide
from jaxad.metrics.guarantees import percent, shortfall, statement
from jaxad.metrics.threshold import ORACLE, Threshold
from jaxad.report.charts import Series, histogram_svg, loss_svg, roc, roc_svg
from jaxad.report.examples import Examples, is_anomalous
from jaxad.report.pictures import contour, hatch, overlay
from jaxad.report.runs import Run, load_run
from jaxad.report.tables import ABSENT, Row, fraction, metric_names, with_means

TRUTH_COLOR = (0, 229, 255)
PREDICTION_COLOR = (255, 31, 143)
ORACLE_BADGE = '<span class="badge">ORACLE: chosen on the test set</span>'
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The browser may load only what the page itself contains."""
CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"
"""Characters that no page has; in names they become escapes."""
OPEN_RUNS = 4
"""A report on more runs than this starts with all of them collapsed."""


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Writes the report on one or several run directories as one HTML file, atomically.

    Sections whose data a run lacks (labels, masks, pixel maps, threshold, scores) are left out.

    Args:
        run_dirs: folders `runs/<method>/<dataset>/<category>` with at least recipe.json, in the order of the page.
        out: the HTML file to write.

    Returns:
        `out`.

    Raises:
        FileNotFoundError: a folder has no recipe.json.
        ValueError: there is no folder, or a file in one of them is damaged.
    """
    if not run_dirs:
        raise ValueError("a report needs at least one run directory; got none: fit and score first")
    runs = [load_run(Path(run_dir)) for run_dir in run_dirs]
    style = importlib.resources.files("jaxad.report").joinpath("style.css").read_text(encoding="utf-8")
    title = "jaxad: " + ", ".join(_distinct_values(runs, "dataset"))
    page = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{escape(title)}</title><style>{style}</style></head><body>",
        *_header(runs),
        *_metrics_table(runs),
    ]
    for number, run in enumerate(runs):
        page += _run(number, run, len(runs) <= OPEN_RUNS, len(_distinct_values(runs, "seed")) > 1)
    page.append("</body></html>\n")
    with replacing(out) as temporary:
        text = re.sub(CONTROL, lambda match: f"\\x{ord(match[0]):02x}", "".join(page))
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return out


def _header(runs: Sequence[Run]) -> Iterator[str]:
    versions = {name: version for run in runs for name, version in run.recipe.get("versions", {}).items()}
    yield '<header><p class="eyebrow">Anomaly detection report</p>'
    yield f"<h1>{escape(', '.join(_distinct_values(runs, 'dataset')))}</h1>"
    yield _facts(
        {
            "Methods": ", ".join(_distinct_values(runs, "method")),
            "Runs": len(runs),
            "Written": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            "Device": ", ".join(_distinct_values(runs, "device")),
            "Versions": " · ".join(f"{name} {version}" for name, version in versions.items()),
        }
    )
    yield "</header>"


def _metrics_table(runs: Sequence[Run]) -> Iterator[str]:
    labels = [tuple(_text(run, name) for name in ("method", "dataset", "category")) for run in runs]
    rows = [
        Row(*label, metrics=run.metrics, reasons=run.reasons, seed=run.recipe.get("seed", 0))
        for label, run in zip(labels, runs, strict=True)
    ]
    names = metric_names(rows)
    if not names:
        return
    kinds = [name.partition("_")[0] for name in names]
    spans = {kind: kinds.count(kind) for kind in kinds}
    yield '<section><h2>Metrics</h2><div class="scroll"><table class="metrics"><thead><tr>'
    yield '<th rowspan="2">Method</th><th rowspan="2">Data set</th><th rowspan="2">Category</th>'
    yield "".join(f'<th class="group" colspan="{span}">{escape(kind)}</th>' for kind, span in spans.items())
    yield "</tr><tr>" + "".join(f'<th class="number">{escape(name.partition("_")[2])}</th>' for name in names)
    yield "</tr></thead><tbody>"
    numbers = {label: number for number, label in reversed(list(enumerate(labels)))}  # the first run of each label
    for row, is_mean in with_means(rows):
        category = escape(row.category)
        if not is_mean:
            category = f'<a href="#run-{numbers[row[:3]]}">{category}</a>'
        yield '<tr class="mean">' if is_mean else "<tr>"
        yield f"<td>{escape(row.method)}</td><td>{escape(row.dataset)}</td>"
        yield f"<th>{category}</th>"
        for name in names:
            value = row.metrics.get(name, math.nan)
            text = fraction(value, row.spread.get(name))
            if math.isnan(value):
                text = f'<abbr title="{escape(row.reasons.get(name, "not evaluated"))}">{text}</abbr>'
            yield f'<td class="number">{text}</td>'
        yield "</tr>"
    yield "</tbody></table></div>"
    reasons = dict.fromkeys(reason for row in rows for reason in row.reasons.values())
    yield f'<p class="note">{ABSENT} {escape("; ".join(reasons))}</p></section>' if reasons else "</section>"


def _run(number: int, run: Run, is_open: bool, show_seed: bool) -> Iterator[str]:
    title = f"{_text(run, 'method')} · {_text(run, 'category')}"
    title += f" · seed {_text(run, 'seed')}" if show_seed else ""
    auroc = run.metrics.get("image_AUROC", math.nan)
    yield f'<details class="run"{" open" if is_open else ""}><summary><h2>{escape(title)}</h2>'
    yield f'<span class="aside">{escape(_text(run, "dataset"))}</span>'
    if run.oracle:
        yield ORACLE_BADGE
    if not math.isnan(auroc):
        yield f'<span class="headline">image AUROC <b>{fraction(auroc)}</b></span>'
    yield f'</summary><div id="run-{number}" class="body">'
    yield from _timings(run)
    if len(run.scores):
        yield from _scores(run)
    losses = run.recipe.get("loss") or []
    if len(losses) > 1:
        yield '<div class="charts"><figure><figcaption><h3>Training</h3></figcaption>'
        yield f"{loss_svg(losses)}</figure></div>"
    if run.examples is not None and len(run.examples.image):
        yield from _examples(run, run.examples)
    yield from _recipe(run)
    yield "</div></details>"


def _timings(run: Run) -> Iterator[str]:
    recipe, seconds = run.recipe, run.recipe.get("seconds", {})
    per_image, peak = seconds.get("score_per_image"), recipe.get("peak_bytes")
    tiles = {
        "Training images": _number(recipe.get("n_train")),
        "Held out": _number(recipe.get("n_heldout")),
        "Test images": _number(len(run.scores) or None),
        "Compile": _seconds(seconds.get("compile")),
        "Fit": _seconds(seconds.get("fit")),
        "Throughput": _quantity(recipe.get("images_per_second"), "images/s"),
        "Per image": _quantity(None if per_image is None else 1000 * per_image, "ms"),
        "Peak memory": _quantity(None if peak is None else peak / 1e9, "GB"),
    }
    yield '<dl class="tiles">'
    yield "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles.items() if value)
    yield "</dl>"


def _scores(run: Run) -> Iterator[str]:
    good, anomalous = run.scores[run.labels == 0], run.scores[run.labels == 1]
    unknown = run.scores[run.labels < 0]
    kinds = {"good": good, "anomalous": anomalous, "unlabeled": unknown}
    series = [Series(name, scores) for name, scores in kinds.items() if len(scores)]
    value = None if run.threshold is None else run.threshold.value
    yield '<div class="charts"><figure><figcaption><h3>Scores</h3><p class="legend">'
    yield " ".join(f'<span class="key {kind.style}">{kind.style} <i>{len(kind.scores)}</i></span>' for kind in series)
    yield f"</p></figcaption>{histogram_svg(series, value)}"
    yield f'<p class="note">{_threshold_note(run.threshold)}</p></figure>'
    has_both_labels = len(good) and len(anomalous)
    n_missed = n_false_alarms = 0
    if run.threshold is not None:
        n_missed = int((~is_anomalous(anomalous, run.threshold.value)).sum())
        n_false_alarms = int(is_anomalous(good, run.threshold.value).sum())
    if has_both_labels:
        point = None if value is None else (n_false_alarms / len(good), 1 - n_missed / len(anomalous))
        legend = '<p class="legend"><span class="key dot">at the threshold</span></p>' if point else ""
        yield f"<figure><figcaption><h3>ROC</h3>{legend}</figcaption>"
        yield f"{roc_svg(roc(run.scores[run.labels >= 0], run.labels[run.labels >= 0]), point)}</figure>"
    if value is not None and len(good) + len(anomalous):
        yield "<figure><figcaption><h3>At the threshold</h3></figcaption>"
        yield '<table class="confusion"><thead><tr>'
        yield "<td></td><th>predicted good</th><th>predicted anomalous</th></tr></thead>"
        yield f"<tbody><tr><th>good</th><td>{len(good) - n_false_alarms}</td>{_error_cell(n_false_alarms)}</tr>"
        yield f"<tr><th>anomalous</th>{_error_cell(n_missed)}<td>{len(anomalous) - n_missed}</td></tr></tbody></table>"
        yield f'<p class="note">{_share(n_false_alarms, len(good), "good images raise a false alarm")}<br>'
        yield f"{_share(n_missed, len(anomalous), 'defects are missed')}</p></figure>"
    elif value is not None:
        count = int(is_anomalous(unknown, value).sum())
        yield f'<figure><figcaption><h3>At the threshold</h3></figcaption><p class="figure">{count}</p>'
        yield f'<p class="note">{_share(count, len(unknown), "images are predicted anomalous")}</p></figure>'
    yield "</div>"
    if value is not None and len(good) + len(anomalous):
        yield from _rates(run, value)


def _rates(run: Run, threshold: float) -> Iterator[str]:
    decisions = decide(run.scores, run.labels, threshold, run.defects)
    rates = {name: getattr(decisions, name) for name in RATES}
    if len(decisions.recall_by_defect) > 1:
        rates |= {f"recall of {kind}": rate for kind, rate in decisions.recall_by_defect.items()}
    if run.pixel_fpr is not None:
        rates |= {"FPR of the pixel threshold": run.pixel_fpr}
    headings = "".join(f'<th class="number">{name}</th>' for name in ("rate", "95 % interval", "images"))
    yield '<section><h3>Rates at the threshold</h3><div class="scroll"><table class="metrics rates">'
    yield f"<thead><tr><th></th>{headings}</tr></thead><tbody>"
    for name, rate in rates.items():
        interval = f"{rate.low:.3f}–{rate.high:.3f}" if rate.n else ABSENT
        cells = (fraction(rate.value), interval, str(rate.n))
        yield f"<tr><th>{escape(name)}</th>" + "".join(f'<td class="number">{cell}</td>' for cell in cells) + "</tr>"
    yield "</tbody></table></div></section>"


def _threshold_note(threshold: Threshold | None) -> str:
    if threshold is None:
        return "No threshold: the images are not classified."
    parts = [escape(threshold.source)]
    if threshold.source == ORACLE:
        parts = [f"{ORACLE_BADGE} for the best F1: an upper bound that new images will not reach"]
    if not math.isnan(threshold.fpr):
        parts.append(f"false-positive rate {percent(threshold.fpr)}")
    if threshold.n:
        grouped = threshold.n_groups < threshold.n
        parts.append(f"n = {threshold.n} of {threshold.n_groups} groups" if grouped else f"n = {threshold.n}")
    known = f"Threshold: {', '.join(parts)}; {statement(threshold)}."
    lacking = shortfall(threshold)
    return " ".join([known, f"{lacking}." if lacking else ""]).replace(" %", "\u00a0%").strip()


def _examples(run: Run, examples: Examples) -> Iterator[str]:
    value = None if run.threshold is None else run.threshold.value
    heat, masks = examples.map, examples.mask
    low, high = examples.limits or (0.0, 0.0)
    columns = ["image"]
    if masks is not None:
        columns.append("mask")
    if heat is not None:
        columns.append("heat map")
        if examples.limits is None:
            low, high = float(np.median(heat)), float(heat.max())
        if run.pixel_threshold is not None:
            columns.append("contour")
    title = "Worst errors, then the closest calls"
    if (examples.label < 0).all():
        title = "Highest scores"
    elif value is None:
        title = "Lowest scores of defects, highest scores of good images"
    yield f'<section><h3>{title}</h3><p class="legend">'
    if heat is not None:
        yield f'<span class="key heat">pixel score <i>{low:.4g}</i> to <i>{high:.4g}</i></span> '
    if heat is not None and run.pixel_threshold is not None:
        yield f'<span class="key prediction">predicted, above <i>{run.pixel_threshold.value:.4g}</i></span> '
        if masks is not None:
            yield '<span class="key truth">ground truth</span>'
    if examples.ignored is not None:
        yield "<span>hatched: ignored</span>"
    yield f'</p><div class="examples" style="--columns:{len(columns)}"><div class="heads" aria-hidden="true">'
    yield "<span></span>" + "".join(f"<span>{column}</span>" for column in columns) + "</div>"
    for i, image in enumerate(examples.image):
        image = hatch(image, None if examples.ignored is None else examples.ignored[i])
        kind, style = _kind(int(examples.label[i]), float(examples.score[i]), value)
        yield f'<figure class="example"><figcaption><span class="kind {style}">{kind}</span>'
        yield f'<span class="score">{examples.score[i]:.4g}</span>'
        if value is not None:
            yield f'<span class="aside">{_distance(examples.score[i] - value)} the threshold</span>'
        yield f'<span class="path">{_path(examples.path[i])}</span></figcaption>'
        pictures = {"image": image}
        if masks is not None:
            pictures["mask"] = masks[i]
        if heat is not None:
            pictures["heat map"] = overlay(image, heat[i], low, high)
        if heat is not None and run.pixel_threshold is not None:
            outlined = image if masks is None else contour(image, masks[i], TRUTH_COLOR)
            predicted = is_anomalous(heat[i], run.pixel_threshold.value)
            if examples.ignored is not None:
                predicted &= ~examples.ignored[i]
            pictures["contour"] = contour(outlined, predicted, PREDICTION_COLOR)
        for name, picture in pictures.items():
            yield f'<span class="cell" data-name="{name}">{_picture(picture, name)}</span>'
        yield "</figure>"
    yield "</div></section>"


def _kind(label: int, score: float, threshold: float | None) -> tuple[str, str]:
    """The caption of an example, and the CSS class that colors it."""
    if threshold is None:
        return {0: ("good", "good"), 1: ("anomalous", "anomalous")}.get(label, ("unlabeled", "unlabeled"))
    if label < 0:
        return ("predicted anomalous", "anomalous") if score > threshold else ("predicted good", "good")
    if label == 1:
        return ("detected defect", "right") if score > threshold else ("missed defect", "wrong")
    return ("false alarm", "wrong") if score > threshold else ("correctly accepted", "right")


def _recipe(run: Run) -> Iterator[str]:
    recipe, weights = run.recipe, run.recipe.get("weights") or {}
    facts = {name.capitalize(): recipe.get(name) for name in ("method", "backbone")}
    facts |= {"Weights": weights.get("path"), "SHA-256": weights.get("sha256"), "Preprocess": recipe.get("preprocess")}
    facts |= {name.capitalize(): recipe.get(name) for name in ("source", "seed", "device", "versions", "command")}
    hyperparameters = {name: _format(value) for name, value in recipe.get("hyperparameters", {}).items()}
    yield f'<section class="recipe"><div><h3>Recipe</h3>{_facts(facts)}</div>'
    yield f"<div><h3>Hyperparameters</h3>{_facts(hyperparameters)}</div></section>"


def _facts(facts: Mapping[str, Any]) -> str:
    """A definition list of names and values, without the entries that have no value."""
    items = ((escape(name), escape(_format(value))) for name, value in facts.items() if value not in (None, ""))
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in items) + "</dl>"


def _format(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {_format(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_format, value))
    return "none" if value is None else str(value)


def _text(run: Run, name: str) -> str:
    return str(run.recipe.get(name) or ABSENT)


def _distinct_values(runs: Sequence[Run], name: str) -> list[str]:
    return list(dict.fromkeys(_text(run, name) for run in runs))


def _seconds(value: float | None) -> str | None:
    return _quantity(value, "s") if value is None or value < 300 else _quantity(value / 60, "min")


def _quantity(value: float | None, unit: str) -> str | None:
    if value is None:
        return None
    return escape(f"{value:.3g}" if value < 1000 else f"{value:,.0f}") + f" <small>{unit}</small>"


def _number(value: int | None) -> str | None:
    return None if value is None else escape(str(value))


def _error_cell(count: int) -> str:
    return f'<td class="wrong">{count}</td>' if count else "<td>0</td>"


def _share(count: int, total: int, description: str) -> str:
    return f"{count} of {total} {description}" + (f" ({100 * count / total:.3g}\u00a0%)." if total else ".")


def _distance(difference: float) -> str:
    return f"{abs(difference):.3g} {'above' if difference > 0 else 'below'}"


def _path(path: str) -> str:
    """The path as text that may wrap after separators."""
    return re.sub(r"([/\\_-])", r"\1<wbr>", escape(path))


def _picture(picture: np.ndarray, name: str) -> str:
    """An image as inline JPEG, a mask as inline PNG, or a note if the mask is empty."""
    buffer = io.BytesIO()
    if picture.dtype == np.uint8:
        Image.fromarray(picture).save(buffer, format="JPEG", quality=88, subsampling=0)
    elif picture.any():
        Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    else:
        return '<span class="empty">empty mask</span>'
    kind = "jpeg" if picture.dtype == np.uint8 else "png"
    return f'<img alt="{name}" src="data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}">'
