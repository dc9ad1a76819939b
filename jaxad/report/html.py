"""One self-contained HTML page about one or several runs: no script, no request, images and charts inline."""

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
from jaxad.metrics.threshold import ORACLE, Threshold
from jaxad.report.charts import Series, histogram_svg, loss_svg, roc, roc_svg
from jaxad.report.examples import Examples, flagged
from jaxad.report.pictures import contour, overlay
from jaxad.report.runs import Run, load_run
from jaxad.report.tables import ABSENT, Row, fraction, metric_names, with_means

TRUTH_COLOR = (0, 229, 255)
PREDICTION_COLOR = (255, 31, 143)
ORACLE_BADGE = '<span class="badge">ORACLE: chosen on the test set</span>'
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load for the page: nothing that is not in it."""
OPEN_RUNS = 4
"""With more runs than this the page opens with all of them folded."""


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the report on one or several run directories as one HTML file, whole or not at all.

    Whatever a run lacks (labels, masks, pixel maps, threshold, scores) is left out of its part of the page.

    Args:
        run_dirs: folders `runs/<method>/<dataset>/<category>` with at least recipe.json, in the order of the page.
        out: the HTML file to write.

    Returns:
        `out`.

    Raises:
        FileNotFoundError: a folder without recipe.json.
        ValueError: no folder at all, or a damaged file in one of them.
    """
    if not run_dirs:
        raise ValueError("a report needs at least one run directory; got none: fit and score first")
    runs = [load_run(Path(run_dir)) for run_dir in run_dirs]
    style = importlib.resources.files("jaxad.report").joinpath("style.css").read_text(encoding="utf-8")
    title = "jaxad: " + ", ".join(_distinct(runs, "dataset"))
    page = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{escape(title)}</title><style>{style}</style></head><body>",
        *_header(runs),
        *_metrics(runs),
    ]
    for number, run in enumerate(runs):
        page += _run(number, run, len(runs) <= OPEN_RUNS, len(_distinct(runs, "seed")) > 1)
    page.append("</body></html>\n")
    with replacing(out) as temporary:
        temporary.write_text("".join(page), encoding="utf-8", errors="backslashreplace")
    return out


def _header(runs: Sequence[Run]) -> Iterator[str]:
    versions = {name: version for run in runs for name, version in run.recipe.get("versions", {}).items()}
    yield '<header><p class="eyebrow">Anomaly detection report</p>'
    yield f"<h1>{escape(', '.join(_distinct(runs, 'dataset')))}</h1>"
    yield _facts(
        {
            "Methods": ", ".join(_distinct(runs, "method")),
            "Runs": len(runs),
            "Written": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            "Device": ", ".join(_distinct(runs, "device")),
            "Versions": " · ".join(f"{name} {version}" for name, version in versions.items()),
        }
    )
    yield "</header>"


def _metrics(runs: Sequence[Run]) -> Iterator[str]:
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
    numbers = {label: number for number, label in reversed(list(enumerate(labels)))}
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


def _run(number: int, run: Run, unfolded: bool, seeds: bool) -> Iterator[str]:
    title = f"{_text(run, 'method')} · {_text(run, 'category')}"
    title += f" · seed {_text(run, 'seed')}" if seeds else ""
    auroc = run.metrics.get("image_AUROC", math.nan)
    yield f'<details class="run"{" open" if unfolded else ""}><summary><h2>{escape(title)}</h2>'
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
        "Training images": recipe.get("n_train"),
        "Held out": recipe.get("n_heldout"),
        "Test images": len(run.scores) or None,
        "Compile": _seconds(seconds.get("compile")),
        "Fit": _seconds(seconds.get("fit")),
        "Throughput": _quantity(recipe.get("images_per_second"), "images/s"),
        "Per image": _quantity(None if per_image is None else 1000 * per_image, "ms"),
        "Peak memory": _quantity(None if peak is None else peak / 1e9, "GB"),
    }
    yield '<dl class="tiles">'
    yield "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles.items() if value is not None)
    yield "</dl>"


def _scores(run: Run) -> Iterator[str]:
    good, anomalous = run.scores[run.labels == 0], run.scores[run.labels == 1]
    unknown = run.scores[run.labels < 0]
    kinds = {"good": good, "anomalous": anomalous, "unlabeled": unknown}
    series = [Series(name, scores) for name, scores in kinds.items() if len(scores)]
    value = None if run.threshold is None else run.threshold.value
    yield '<div class="charts"><figure><figcaption><h3>Scores</h3><p class="legend">'
    yield " ".join(f'<span class="key {one.style}">{one.style} <i>{len(one.scores)}</i></span>' for one in series)
    yield f"</p></figcaption>{histogram_svg(series, value)}"
    yield f'<p class="note">{_threshold_words(run.threshold)}</p></figure>'
    labeled = len(good) and len(anomalous)
    missed = false_alarms = 0
    if run.threshold is not None:
        missed = int((~flagged(anomalous, run.threshold.value)).sum())
        false_alarms = int(flagged(good, run.threshold.value).sum())
    if labeled:
        at = None if value is None else (false_alarms / len(good), 1 - missed / len(anomalous))
        legend = '<p class="legend"><span class="key dot">at the threshold</span></p>' if at else ""
        yield f"<figure><figcaption><h3>ROC</h3>{legend}</figcaption>"
        yield f"{roc_svg(roc(run.scores[run.labels >= 0], run.labels[run.labels >= 0]), at)}</figure>"
    if value is not None and len(good) + len(anomalous):
        yield "<figure><figcaption><h3>At the threshold</h3></figcaption>"
        yield '<table class="confusion"><thead><tr><td></td><th>called good</th><th>called anomalous</th></tr></thead>'
        yield f"<tbody><tr><th>good</th><td>{len(good) - false_alarms}</td>{_errors(false_alarms)}</tr>"
        yield f"<tr><th>anomalous</th>{_errors(missed)}<td>{len(anomalous) - missed}</td></tr></tbody></table>"
        yield f'<p class="note">{_share(false_alarms, len(good), "good images raise a false alarm")}<br>'
        yield f"{_share(missed, len(anomalous), 'defects are missed')}</p></figure>"
    elif value is not None:
        count = int(flagged(unknown, value).sum())
        yield f'<figure><figcaption><h3>At the threshold</h3></figcaption><p class="figure">{count}</p>'
        yield f'<p class="note">{_share(count, len(unknown), "images are called anomalous")}</p></figure>'
    yield "</div>"


def _threshold_words(threshold: Threshold | None) -> str:
    if threshold is None:
        return "No threshold: nothing is called good or anomalous."
    words = [escape(threshold.source)]
    if threshold.source == ORACLE:
        words = [f"{ORACLE_BADGE} for the best F1 there: an upper bound, not what new images will see"]
    if not math.isnan(threshold.fpr):
        words.append(f"false-positive rate {100 * threshold.fpr:.3g}\u00a0%")
    if threshold.n:
        words.append(f"n = {threshold.n}")
    if threshold.guaranteed_fpr < 1:
        words.append(f"at most {100 * threshold.guaranteed_fpr:.3g}\u00a0% guaranteed")
    return "Threshold: " + ", ".join(words) + "."


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
    yield f'</p><div class="examples" style="--columns:{len(columns)}"><div class="heads" aria-hidden="true">'
    yield "<span></span>" + "".join(f"<span>{column}</span>" for column in columns) + "</div>"
    for i, image in enumerate(examples.image):
        kind, style = _kind(int(examples.label[i]), float(examples.score[i]), value)
        yield f'<figure class="example"><figcaption><span class="kind {style}">{kind}</span>'
        yield f'<span class="score">{examples.score[i]:.4g}</span>'
        if value is not None:
            yield f'<span class="aside">{_against(examples.score[i] - value)} the threshold</span>'
        yield f'<span class="path">{_path(examples.path[i])}</span></figcaption>'
        pictures = {"image": image}
        if masks is not None:
            pictures["mask"] = masks[i]
        if heat is not None:
            pictures["heat map"] = overlay(image, heat[i], low, high)
        if heat is not None and run.pixel_threshold is not None:
            outlined = image if masks is None else contour(image, masks[i], TRUTH_COLOR)
            predicted = flagged(heat[i], run.pixel_threshold.value)
            pictures["contour"] = contour(outlined, predicted, PREDICTION_COLOR)
        for name, picture in pictures.items():
            yield f'<span class="cell" data-name="{name}">{_picture(picture, name)}</span>'
        yield "</figure>"
    yield "</div></section>"


def _kind(label: int, score: float, threshold: float | None) -> tuple[str, str]:
    """What an example is, in words, and the CSS class that colors it."""
    if threshold is None:
        return {0: ("good", "good"), 1: ("anomalous", "anomalous")}.get(label, ("unlabeled", "unlabeled"))
    if label < 0:
        return ("called anomalous", "anomalous") if score > threshold else ("called good", "good")
    if label == 1:
        return ("detected defect", "right") if score > threshold else ("missed defect", "wrong")
    return ("false alarm", "wrong") if score > threshold else ("passed as good", "right")


def _recipe(run: Run) -> Iterator[str]:
    recipe, weights = run.recipe, run.recipe.get("weights") or {}
    facts = {name.capitalize(): recipe.get(name) for name in ("method", "backbone")}
    facts |= {"Weights": weights.get("path"), "SHA-256": weights.get("sha256"), "Preprocess": recipe.get("preprocess")}
    facts |= {name.capitalize(): recipe.get(name) for name in ("source", "seed", "device", "versions", "command")}
    hyperparameters = {name: _plain(value) for name, value in recipe.get("hyperparameters", {}).items()}
    yield f'<section class="recipe"><div><h3>Recipe</h3>{_facts(facts)}</div>'
    yield f"<div><h3>Hyper-parameters</h3>{_facts(hyperparameters)}</div></section>"


def _facts(facts: Mapping[str, Any]) -> str:
    """A list of names and values; those without a value are left out."""
    items = ((escape(name), escape(_plain(value))) for name, value in facts.items() if value not in (None, ""))
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in items) + "</dl>"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return "none" if value is None else str(value)


def _text(run: Run, name: str) -> str:
    return str(run.recipe.get(name) or ABSENT)


def _distinct(runs: Sequence[Run], name: str) -> list[str]:
    return list(dict.fromkeys(_text(run, name) for run in runs))


def _seconds(value: float | None) -> str | None:
    return _quantity(value, "s") if value is None or value < 300 else _quantity(value / 60, "min")


def _quantity(value: float | None, unit: str) -> str | None:
    if value is None:
        return None
    return (f"{value:.3g}" if value < 1000 else f"{value:,.0f}") + f" <small>{unit}</small>"


def _errors(count: int) -> str:
    return f'<td class="wrong">{count}</td>' if count else "<td>0</td>"


def _share(count: int, total: int, what: str) -> str:
    return f"{count} of {total} {what}" + (f" ({100 * count / total:.3g}\u00a0%)." if total else ".")


def _against(difference: float) -> str:
    return f"{abs(difference):.3g} {'above' if difference > 0 else 'below'}"


def _path(path: str) -> str:
    """The path as text that may break after its separators."""
    return re.sub(r"([/\\_-])", r"\1<wbr>", escape(path))


def _picture(picture: np.ndarray, name: str) -> str:
    """A photograph as JPEG, a mask as PNG, an empty mask in words."""
    buffer = io.BytesIO()
    if picture.dtype == np.uint8:
        Image.fromarray(picture).save(buffer, format="JPEG", quality=88, subsampling=0)
    elif picture.any():
        Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    else:
        return '<span class="empty">nothing marked</span>'
    kind = "jpeg" if picture.dtype == np.uint8 else "png"
    return f'<img alt="{name}" src="data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}">'
