"""Writes the tables of results in the documents from experiments/results/*.json; nobody types a number there.

    python -m experiments.update_readme

A table lies between <!-- results --> and <!-- /results -->; that of a data set or an experiment begins with its name,
as in <!-- results mtd -->. `--check` changes nothing, and fails if a table differs from the results. Both list the
results that are older than the code of their method, or than their recipe; the tables mark them with a dagger.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from experiments.command import RESULTS, ROOT, start
from experiments.provenance import is_current
from experiments.recipes import all_recipes
from jaxad import methods
from jaxad.files import read_json, write_atomically
from jaxad.report.tables import (
    ABSENT,
    fraction,
    markdown_table,
    metric_cells,
    read_results,
    recipe_cell,
    results_markdown,
    stale_note,
)

MARKED = re.compile(r"^(<!-- results ?(\w*) -->\n).*?(?=^<!-- /results -->$)", re.DOTALL | re.MULTILINE)
RECIPES = all_recipes()
PUBLISHED = {name: recipe.published for name, recipe in RECIPES.items()}
"""What the recipes have as published now; a result has what they had when it was measured."""
NO_RESULT = "There is no result yet: run `python -m experiments.{}`.\n"


@dataclass
class Options:
    """Update the tables of results."""

    documents: tuple[Path, ...] = (ROOT / "README.md", ROOT / "docs" / "results.md")
    results: Path = RESULTS
    check: bool = False
    """Change nothing; fail if a table is out of date."""


def foreign_images(record: dict[str, Any]) -> str:
    """The AUROC of flows for foreign images, from nf_ood.json or, for flows of a class, nf_ood_CLASS.json."""
    rows, category = record["flows"], record["experiment"].removeprefix("nf_ood").removeprefix("_")
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row["auroc"]))
    return markdown_table(
        [f"flow, trained on {category or 'CIFAR-10'}", "bits per dimension", *kinds],
        [
            [name, fraction(row["bits_per_dimension"]) if row["bits_per_dimension"] is not None else ABSENT]
            + [fraction(row["auroc"][kind]) if kind in row["auroc"] else ABSENT for kind in kinds]
            for name, row in rows.items()
        ],
    )


def speed_of_flows(record: dict[str, Any]) -> str:
    """How fast flows train, from bench_flows.json."""

    def ratio(part: str, name: str, key: str) -> str:
        return f"{record[part][name][key]:.1f}" if name in record[part] else ABSENT

    def row(name: str, seconds: dict[str, float]) -> list[str]:
        return [
            f"`{name}`",
            *(f"{1000 * seconds[key]:.0f}" for key in ("cached", "backbone")),
            ratio("flows", name, "plain_loop_over_cached"),
            ratio("freia", name, "freia_over_jaxad"),
            ratio("classes_at_once", name, "in_turn_over_one_program"),
        ]

    heads = ["flow", "step, ms", "backbone, ms", "plain loop / step", "FrEIA / step", "4 classes in turn / at once"]
    return markdown_table(heads, [row(name, flow["seconds_a_step"]) for name, flow in record["flows"].items()])


def latency(record: dict[str, Any]) -> str:
    """Images per second of every method, from bench_latency.json."""
    heads, peaks = ["method", "backbone", "device"], {}
    for row in record["rows"]:  # a busy machine measures a lower one
        peaks[row["device"]] = max(row["peak_flops_a_second"], peaks.get(row["device"], 0))
    for size in record["batches"]:
        heads += [f"images/s, batch {size}", "backbone", "of the peak"]

    def cells_of(row: dict[str, Any]) -> list[str]:
        cells = [f"`{row['method']}`", row["backbone"], row["device"]]
        for size, measured in row["batches"].items():
            count, speed = measured["operations"], measured["images_a_second"]
            of_peak = None if count is None else count / int(size) * speed / peaks[row["device"]]
            shares = (measured["backbone_share"], of_peak)
            cells += [f"{speed:.1f}", *(ABSENT if share is None else f"{share:.0%}" for share in shares)]
        return cells

    return markdown_table(heads, [cells_of(row) for row in record["rows"]], left=3)


def speed_of_generators(record: dict[str, Any]) -> str:
    """Synthetic anomalies per second, from bench_generators.json."""

    def row(name: str, device: str, rates: dict[str, float]) -> list[str]:
        plain = [f"{rates['numpy_images_a_second']:.0f}", f"{rates['ratio']:.1f}"] if "ratio" in rates else [ABSENT] * 2
        return [name, device, f"{rates['images_a_second']:.0f}", *plain]

    heads = ["generator", "device", "images/s", "one at a time in numpy and Pillow", "ratio"]
    rows = [row(name, device, rates) for device, part in record["devices"].items() for name, rates in part.items()]
    return markdown_table(heads, rows, left=2)


def place_of_synthesis(record: dict[str, Any]) -> str:
    """DRAEM's training with anomalies drawn within its step, by the host and not at all, from bench_synthesis.json."""
    places = {"within the step": "within_step", "by the host": "by_host", "nowhere": "without"}

    def cells(device: str, row: dict[str, Any], name: str, key: str) -> list[str]:
        measured = row[key]
        low, high = (f"{seconds:.3g}" for seconds in measured["quartiles"])
        seconds = f"{measured['seconds_a_step']:.3g} ({low} to {high})"
        return [
            name,
            device,
            *(str(row[key]) for key in ("size", "width", "batch")),
            f"{measured['images_a_second']:.3g}",
            seconds,
            f"{measured['host_seconds_a_step']:.3g}",
        ]

    rows = [cells(device, row, *place) for device, row in record["devices"].items() for place in places.items()]
    heads = ["anomalies are drawn", "device", "px", "channels", "images a step", "images/s"]
    return markdown_table([*heads, "seconds a step (middle half)", "of the host"], rows, left=2)


def work_and_pauses(record: dict[str, Any]) -> str:
    """The share of time in which a device works while DRAEM trains, from profile_draem.json."""

    def cells_of(device: str, row: dict[str, Any]) -> list[str]:
        share, pause = f"{row['share_at_work']:.1%}", f"{1000 * row['longest_pause_seconds']:.1f}"
        return [device, *(str(row[k]) for k in ("size", "width", "batch")), f"{row['seconds']:.1f}", share, pause]

    heads = ["device", "px", "channels", "images a step", "seconds", "at work", "longest pause, ms"]
    return markdown_table(heads, [cells_of(*item) for item in record["devices"].items()])


def pixel_auroc_by_epoch(record: dict[str, Any]) -> str:
    """The pixel_AUROC of test images after every fourth epoch, from epochs_*.json."""
    curves = {library: curve["pixel_AUROC"] for library, curve in record["curves"].items()}
    epochs = range(4, max(map(len, curves.values())) + 1, 4)

    def row(library: str, values: list[float]) -> list[str]:
        cells = [values[epoch - 1] if epoch <= len(values) else None for epoch in epochs]
        cells += [max(values), record["curves"][library]["stopped"]]
        return [library, *(ABSENT if value is None else fraction(value) for value in cells)]

    heads = ["blocks", *(f"epoch {epoch}" for epoch in epochs), "best", "stopped as anomalib's"]
    return markdown_table(heads, [row(*curve) for curve in curves.items()])


def held_out_loss(record: dict[str, Any]) -> str:
    """The loss of held-out normal images after the first, middle and last epoch, from select_*.json."""
    curves = record["held_out_loss"]
    last = min(map(len, curves.values()))
    epochs = sorted({1, (last + 1) // 2, last})
    heads = [f"`{record.get('varied', 'learning_rate')}`", *(f"epoch {epoch}" for epoch in epochs)]
    return markdown_table(
        heads, [[value, *(fraction(curve[e - 1]) for e in epochs)] for value, curve in curves.items()]
    )


def transfer(record: dict[str, Any]) -> str:
    """The AUROC of every kind of defect, averaged over categories, by generator; from ablate_generators_*.json."""
    rows = record["generators"]
    kinds = list(next(iter(next(iter(rows.values())).values())))

    def cell(categories: dict[str, Any], kind: str) -> str:
        return fraction(fmean(row[kind]["image_AUROC"] for row in categories.values()))

    cells = [[name, *(cell(categories, kind) for kind in kinds)] for name, categories in rows.items()]
    return markdown_table(["learned from", *kinds], cells)


def beside_anomalib(record: dict[str, Any]) -> str:
    """The metrics of jaxad and anomalib after the same steps, from anomalib_*.json."""
    names = ("image_AUROC", "image_AP", "pixel_AUROC", "pixel_AP")

    def cell(fits: list[dict[str, Any]], name: str) -> str:
        values = [fit["metrics"][name] for fit in fits]
        return fraction(fmean(values)) + (f" ± {fraction(pstdev(values))}" if len(values) > 1 else "")

    rows = [
        [f"`{method}`", str(row["images"]["size"]), str(row["epochs"] or ABSENT)]
        + [cell(row[library], name) for name in names for library in ("jaxad", "anomalib")]
        for method, row in record["methods"].items()
    ]
    return markdown_table(["method", "px", "epochs", *(head for name in names for head in (name, "anomalib"))], rows)


def new_parts(record: dict[str, Any]) -> str:
    """How often thresholds keep their rate on new parts, from new_parts.json."""

    def cells(name: str, row: dict[str, Any], told: bool) -> list[str]:
        rates = row["told" if told else "not_told"]
        counts = [str(row[key]) for key in ("images", "parts")] + [f"{rates['held_out_groups']:.0f}"]
        shares = [f"{rates[key]:.1%}" for key in ("stated_average", "observed", "stated_95")]
        return [name, "told" if told else "not told", *counts, *shares, f"{rates['splits_within_95']:.0%}"]

    rows = [cells(name, row, told) for name, row in record["sets"].items() for told in (True, False)]
    heads = ["images", "parts", "held out", "stated", "observed", "stated with 95 % confidence", "splits within"]
    return markdown_table(["data", "groups", *heads], rows, left=2)


def tails(record: dict[str, Any]) -> str:
    """The rates of Pareto tails, from tails.json: the lowest and the highest over distributions."""

    def span(row: dict[str, Any], key: str) -> str:
        rates = [rates[key] for rates in row["rates"].values()]
        return f"{min(rates):.1%} to {max(rates):.1%}"

    rows = [
        [str(row["images"]), f"{row['target']:.1%}", *(span(row, key) for key in ("median", "mean", "highest_score"))]
        for row in record["rows"]
    ]
    return markdown_table(["images", "target", "median rate", "average rate", "with the highest score"], rows, left=0)


def known_parts(record: dict[str, Any]) -> str:
    """What neighbors of the same part are worth, from known_parts.json."""
    rows = [
        [
            name,
            f"{row['nearest_is_own']:.0%}",
            *(fraction(row[k]) for k in ("distance_ratio", "with_own", "without_own")),
        ]
        for name, row in record["features"].items()
    ]
    heads = [
        "nearest is of the same tile",
        "its distance / that to other tiles",
        "image_AUROC",
        "without the same tile",
    ]
    return markdown_table(["features", *heads], rows)


def narrow_gap(record: dict[str, Any]) -> str:
    """What was tried against the gap between known and new parts, from narrow_gap.json."""

    def cells(splits: list[dict[str, float]], key: str) -> str:
        values = [split[key] for split in splits]
        return f"{fraction(fmean(values))} ± {fraction(pstdev(values))}"

    rows = [
        [f"`{method}`", label, *(cells(splits, key) for key in ("known", "new", "false_alarms"))]
        for method, variants in record["tried"].items()
        for label, splits in variants.items()
    ]
    heads = ["method", "change", "AUROC, known tiles", "AUROC, new tiles", "false alarms on new tiles"]
    return markdown_table(heads, rows, left=2)


def lost_on_new_parts(results: Path, dataset: str) -> str:
    """The image_AUROC of recipes on the usual split and on splits by part, by what they lose."""
    known = {result["recipe"]: result for result in read_results(results, dataset)}
    rows = []
    for result in read_results(results, f"{dataset}_tiles"):
        usual = known.get(result["recipe"].removesuffix("_tiles"))
        if usual is not None:
            of_both = [one["metrics"]["image_AUROC"] for one in (usual, result)]
            rows.append((of_both[0]["mean"] - of_both[1]["mean"], result["recipe"], of_both))
    cells = [
        [f"`{name}`", *(fraction(auroc["mean"]) for auroc in aurocs), fraction(loss)]
        for loss, name, aurocs in sorted(rows)
    ]
    return markdown_table(["recipe", "usual split", "new tiles", "lost"], cells)


EXPERIMENTS = {
    "known_parts": (known_parts, "studies.known_parts"),
    "narrow_gap": (narrow_gap, "studies.narrow_gap"),
    "tails": (tails, "studies.tails"),
    "new_parts": (new_parts, "studies.new_parts"),
    "anomalib_bottle": (beside_anomalib, "bench.anomalib_peers"),
    "anomalib_mtd": (beside_anomalib, "bench.anomalib_peers"),
    "ablate_generators_mtd": (transfer, "studies.ablate_generators"),
    "ablate_generators_demo": (transfer, "studies.ablate_generators"),
    "nf_ood": (foreign_images, "studies.nf_ood"),
    "nf_ood_bottle": (foreign_images, "studies.nf_ood"),
    "bench_flows": (speed_of_flows, "bench.flows"),
    "bench_latency": (latency, "bench.latency"),
    "bench_synthesis": (place_of_synthesis, "bench.synthesis"),
    "bench_generators": (speed_of_generators, "bench.generators"),
    "profile_draem": (work_and_pauses, "bench.profile_draem"),
    "epochs_fastflow_bottle": (pixel_auroc_by_epoch, "studies.epoch_curve"),
    "epochs_cfa_bottle": (pixel_auroc_by_epoch, "studies.epoch_curve"),
    "select_simplenet_mtd_feature_scale": (held_out_loss, "studies.select_rate"),
    "select_glass_mtd_feature_scale": (held_out_loss, "studies.select_rate"),
    "select_efficientad_mtd": (held_out_loss, "studies.select_rate"),
}
"""Experiments with a table of their own: the function that makes it, and the module that writes the result."""


def stale_results(results: Path) -> list[str]:
    """The recipes whose results are older than their code, or than the recipe, which may be gone."""
    names = {result["recipe"]: result for result in read_results(results)}
    return [name for name, result in names.items() if not is_current(result, RECIPES.get(name))]


def best_results(results: Path, dataset: str, stale: list[str]) -> str:
    """One row per method, grouped by family: its recipe with the highest image_AUROC on a data set.

    Beside it stands the image_AUROC of the same recipe on splits by part, where it has been measured.
    """
    best: dict[str, dict[str, Any]] = {}
    by_part = {result["recipe"]: result for result in read_results(results, f"{dataset}_tiles")}
    for result in read_results(results, dataset, PUBLISHED):
        others = best.setdefault(result["method"], result)["metrics"]["image_AUROC"]["mean"]
        if result["metrics"]["image_AUROC"]["mean"] > others:
            best[result["method"]] = result
    rows, sources = [], {}
    for description in sorted(map(methods.describe, best), key=lambda one: (one.family, one.name)):
        result = best[description.name]
        year = re.search(r"\b(20\d\d)\b", description.paper)
        name = f"{description.title}, {year[1]}" if year else description.title
        metrics = metric_cells(result, ("image_AUROC", "pixel_AUPRO"), sources)
        tiles = by_part.get(f"{result['recipe']}_tiles", {"metrics": {}})
        new_parts = metric_cells(tiles, ("image_AUROC",), sources)[:1]
        rows.append([description.family, name, recipe_cell(result, stale), *metrics[:2], *new_parts, *metrics[2:]])
    headings = ["family", "method", "recipe", "image_AUROC", "published", "new tiles", "pixel_AUPRO", "published"]
    listed = ", ".join(f"[{number}] {source.replace(', ', ' ')}" for source, number in sources.items())
    table = markdown_table(headings, rows, left=3)
    return table + stale_note(table) + (f"\nPublished: {listed}.\n" if sources else "")


def updated(document: str, results: Path) -> str:
    """The text of a document with the tables of a folder of results between their markers.

    Raises:
        ValueError: There are no markers, a pair of them occurs twice, or a file in the folder is no result.
    """
    stale = stale_results(results)

    def filled(match: re.Match[str]) -> str:
        name = match[2]
        if name in EXPERIMENTS:
            path, (table, module) = results / f"{name}.json", EXPERIMENTS[name]
            return match[1] + (table(read_json(path)) if path.exists() else NO_RESULT.format(module))
        dataset = name.removeprefix("best_").removeprefix("lost_")
        if name.startswith("lost_"):
            table = lost_on_new_parts(results, dataset)
        elif dataset == name:
            table = results_markdown(results, name or None, PUBLISHED, stale)
        else:
            table = best_results(results, dataset, stale)
        return match[1] + (table if table.count("\n") > 2 else NO_RESULT.format("run"))  # more than the head

    names = [match[2] for match in MARKED.finditer(document)]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            "a document needs <!-- results --> and <!-- /results -->, on lines of their own, each pair once; got "
            + (", ".join(f"<!-- results {name} -->" for name in names) or "none")
        )
    return MARKED.sub(filled, document)


def main(options: Options) -> None:
    """Updates the documents, or checks them."""
    stale = stale_results(options.results)
    if stale:
        print(f"{len(stale)} results are older than their code: {', '.join(stale)}")
    for path in options.documents:
        old = path.read_text(encoding="utf-8")
        new = updated(old, options.results)
        if options.check and new != old:
            raise ValueError(
                f"{path} is out of date: run python -m experiments.update_readme, which also marks results that are "
                "older than their code, or first measure those again with python -m experiments.run"
            )
        if new != old:
            write_atomically(path, new)


if __name__ == "__main__":
    start(main, Options)
