"""Writes the tables of results in the documents anew, from experiments/results/*.json; nobody types a number there.

    python -m experiments.update_readme

A table stands between <!-- results --> and <!-- /results -->, or, for one data set or experiment, between
<!-- results mtd --> and the same. `--check` changes nothing and fails where a table is not the one that the results
give.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.command import start
from jaxad.files import read_json, write_atomically
from jaxad.report.tables import ABSENT, fraction, markdown_table, results_markdown

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"^(<!-- results ?(\w*) -->\n).*?(?=^<!-- /results -->$)", re.DOTALL | re.MULTILINE)
NONE = "Nothing is measured yet: see `experiments/{}.py`.\n"


@dataclass
class Options:
    """Update the tables of results."""

    documents: tuple[Path, ...] = (ROOT / "README.md", ROOT / "docs" / "results.md")
    results: Path = ROOT / "experiments" / "results"
    check: bool = False
    """Change nothing; fail where a table is out of date."""


def foreign_images(record: dict[str, Any]) -> str:
    """The AUROC of flows for foreign images, of nf_ood.json, and of nf_ood_CLASS.json for those trained on a class."""
    rows, own = record["flows"], record["experiment"].removeprefix("nf_ood").removeprefix("_")
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row["auroc"]))
    return markdown_table(
        [f"flow, trained on {own or 'CIFAR-10'}", "bits per dimension", *kinds],
        [
            [name, fraction(row["bits_per_dimension"]) if row["bits_per_dimension"] is not None else ABSENT]
            + [fraction(row["auroc"][kind]) if kind in row["auroc"] else ABSENT for kind in kinds]
            for name, row in rows.items()
        ],
    )


def speed_of_flows(record: dict[str, Any]) -> str:
    """How fast flows are trained, of bench_flows.json."""

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
    """Images a second of every method, of bench_latency.json."""
    heads, peaks = ["method", "backbone", "device"], {}
    for row in record["rows"]:  # a busy machine has a lower one
        peaks[row["device"]] = max(row["peak_flops_a_second"], peaks.get(row["device"], 0))
    for size in record["batches"]:
        heads += [f"images/s, batch {size}", "backbone", "of the peak"]

    def cells_of(row: dict[str, Any]) -> list[str]:
        cells = [f"`{row['method']}`", row["backbone"], row["device"]]
        for size, found in row["batches"].items():
            count, speed = found["operations"], found["images_a_second"]
            share = None if count is None else count / int(size) * speed / peaks[row["device"]]
            shares = (found["backbone_share"], share)
            cells += [f"{speed:.1f}", *(ABSENT if s is None else f"{s:.0%}" for s in shares)]
        return cells

    return markdown_table(heads, [cells_of(row) for row in record["rows"]], left=3)


def speed_of_generators(record: dict[str, Any]) -> str:
    """Synthetic anomalies a second, of bench_generators.json."""

    def row(name: str, device: str, found: dict[str, float]) -> list[str]:
        plain = [f"{found['numpy_images_a_second']:.0f}", f"{found['ratio']:.1f}"] if "ratio" in found else [ABSENT] * 2
        return [name, device, f"{found['images_a_second']:.0f}", *plain]

    heads = ["generator", "device", "images/s", "one at a time in numpy and Pillow", "ratio"]
    rows = [row(name, device, found) for device, part in record["devices"].items() for name, found in part.items()]
    return markdown_table(heads, rows, left=2)


def place_of_synthesis(record: dict[str, Any]) -> str:
    """DRAEM's training with anomalies drawn within its step, by the host and not at all, of bench_synthesis.json."""
    places = {"within the step": "within_step", "by the host": "by_host", "nowhere": "without"}

    def cells(device: str, row: dict[str, Any], name: str, of: str) -> list[str]:
        found = row[of]
        low, high = (f"{seconds:.3g}" for seconds in found["quartiles"])
        seconds = f"{found['seconds_a_step']:.3g} ({low} to {high})"
        return [
            name,
            device,
            *(str(row[key]) for key in ("size", "width", "batch")),
            f"{found['images_a_second']:.3g}",
            seconds,
            f"{found['host_seconds_a_step']:.3g}",
        ]

    rows = [cells(device, row, *place) for device, row in record["devices"].items() for place in places.items()]
    heads = ["anomalies are drawn", "device", "px", "channels", "images a step", "images/s"]
    return markdown_table([*heads, "seconds a step (middle half)", "of the host"], rows, left=2)


def work_and_pauses(record: dict[str, Any]) -> str:
    """How far a device is at work while DRAEM is trained, of profile_draem.json."""

    def cells_of(device: str, row: dict[str, Any]) -> list[str]:
        share, pause = f"{row['share_at_work']:.1%}", f"{1000 * row['longest_pause_seconds']:.1f}"
        return [device, *(str(row[k]) for k in ("size", "width", "batch")), f"{row['seconds']:.1f}", share, pause]

    heads = ["device", "px", "channels", "images a step", "seconds", "at work", "longest pause, ms"]
    return markdown_table(heads, [cells_of(*item) for item in record["devices"].items()])


def pixel_auroc_by_epoch(record: dict[str, Any]) -> str:
    """The pixel_AUROC of test images after every fourth epoch, of epochs_*.json."""
    curves = {of: curve["pixel_AUROC"] for of, curve in record["curves"].items()}
    epochs = range(4, max(map(len, curves.values())) + 1, 4)

    def row(of: str, values: list[float]) -> list[str]:
        shown = [values[epoch - 1] if epoch <= len(values) else None for epoch in epochs]
        shown += [max(values), record["curves"][of]["stopped"]]
        return [of, *(ABSENT if value is None else fraction(value) for value in shown)]

    heads = ["blocks", *(f"epoch {epoch}" for epoch in epochs), "best", "stopped as anomalib's"]
    return markdown_table(heads, [row(*curve) for curve in curves.items()])


def held_out_loss(record: dict[str, Any]) -> str:
    """The loss of normal images that were not learned, after the first, middle and last epoch, of select_*.json."""
    curves = record["held_out_loss"]
    last = min(map(len, curves.values()))
    epochs = sorted({1, (last + 1) // 2, last})
    heads = [f"`{record.get('varied', 'learning_rate')}`", *(f"epoch {epoch}" for epoch in epochs)]
    return markdown_table(heads, [[of, *(fraction(curve[e - 1]) for e in epochs)] for of, curve in curves.items()])


def transfer(record: dict[str, Any]) -> str:
    """The AUROC of every kind of defect, a mean of categories, by the generator that a discriminator learned from."""
    rows = record["generators"]
    kinds = list(next(iter(next(iter(rows.values())).values())))

    def cell(categories: dict[str, Any], kind: str) -> str:
        return fraction(sum(found[kind]["image_AUROC"] for found in categories.values()) / len(categories))

    cells = [[name, *(cell(categories, kind) for kind in kinds)] for name, categories in rows.items()]
    return markdown_table(["learned from", *kinds], cells)


EXPERIMENTS = {
    "ablate_generators_mtd": (transfer, "ablate_generators"),
    "ablate_generators_demo": (transfer, "ablate_generators"),
    "nf_ood": (foreign_images, "nf_ood"),
    "nf_ood_bottle": (foreign_images, "nf_ood"),
    "bench_flows": (speed_of_flows, "bench_flows"),
    "bench_latency": (latency, "bench_latency"),
    "bench_synthesis": (place_of_synthesis, "bench_synthesis"),
    "bench_generators": (speed_of_generators, "bench_generators"),
    "profile_draem": (work_and_pauses, "profile_draem"),
    "epochs_fastflow_bottle": (pixel_auroc_by_epoch, "epoch_curve"),
    "epochs_cfa_bottle": (pixel_auroc_by_epoch, "epoch_curve"),
    "select_simplenet_mtd_feature_scale": (held_out_loss, "select_rate"),
    "select_glass_mtd_feature_scale": (held_out_loss, "select_rate"),
    "select_efficientad_mtd": (held_out_loss, "select_rate"),
}
"""What has a table of its own, and the script that measures it."""


def updated(document: str, results: Path) -> str:
    """The text of a document with the tables of `results` between their markers.

    Raises:
        ValueError: There are no markers, or a pair of them twice, or a file in `results` is no result.
    """

    def filled(match: re.Match[str]) -> str:
        name = match[2]
        if name in EXPERIMENTS:
            path, (table, script) = results / f"{name}.json", EXPERIMENTS[name]
            return match[1] + (table(read_json(path)) if path.exists() else NONE.format(script))
        table = results_markdown(results, name or None)
        return match[1] + (table if table.count("\n") > 2 else NONE.format("run"))  # two lines are the head alone

    names = [match[2] for match in MARKED.finditer(document)]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            "a document needs <!-- results --> and <!-- /results -->, on lines of their own, and each pair once; got "
            + (", ".join(f"<!-- results {name} -->" for name in names) or "none")
        )
    return MARKED.sub(filled, document)


def main(options: Options) -> None:
    """Writes the documents, or checks them."""
    for path in options.documents:
        old = path.read_text(encoding="utf-8")
        new = updated(old, options.results)
        if options.check and new != old:
            raise ValueError(f"{path} is out of date: run python -m experiments.update_readme")
        if new != old:
            write_atomically(path, new)


if __name__ == "__main__":
    start(main, Options)
