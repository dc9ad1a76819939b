"""Whether thresholds keep their rate on parts that were never seen, with groups told and without; new_parts.json.

    python -m experiments.studies.new_parts --mtd MTD_FOLDER

Three sets of normal images with several of every part: Magnetic Tile Defects, whose tiles were photographed under up
to six exposures, and two rendered here, each shot of a part with an exposure, a shift and noise of its own. In each of
many splits a fifth of the parts is tested, and Mahalanobis AD with the embedded backbone learns from the others, once
with their groups told and once without. The observed rate of false alarms is compared with what the threshold states:
on average over the splits with `guaranteed_fpr`, and in every split with `confident_fpr`. `--smoke` is the small
variant for the tests.
"""

import dataclasses
from pathlib import Path
from statistics import fmean

import jax
import numpy as np

from experiments.command import RESULTS, ROOT, origin, progress, start
from experiments.opening import grouped
from jaxad.data import Arrays, Dataset, Preprocess, demo, open_data
from jaxad.driver.embedding import EmbeddingCache
from jaxad.driver.execution import Execution
from jaxad.driver.scoring import embed_all, score_classes
from jaxad.files import write_json
from jaxad.learning import configured, learn, load_frozen
from jaxad.metrics.guarantees import confident_fpr
from jaxad.settings import Settings

SIZE = 128
RENDERED = {"rendered fabric": ("fabric", 60, 5), "rendered metal": ("brushed_metal", 40, 8)}
"""Category, parts and shots of each."""


@dataclasses.dataclass
class Options:
    """Thresholds on new parts."""

    mtd: Path | None = None
    """Magnetic Tile Defects; None: without."""
    splits: int = 100
    fpr: float = 0.05
    results: Path = RESULTS
    smoke: bool = False
    """Few splits and small images."""


def shots(category: str, parts: int, count: int, size: int) -> Dataset:
    """Rendered images: `count` shots of each part, under exposures, shifts and noise of their own."""
    rng, images = np.random.default_rng(0), []
    for part in range(parts):
        image = demo.render(category, part, size=size)[0].astype(float)
        for _ in range(count):
            moved = np.roll(image, rng.integers(-size // 16, size // 16 + 1, 2), (0, 1))
            noisy = rng.uniform(0.7, 1.2) * moved + rng.normal(0, 3, image.shape)
            images.append(noisy.clip(0, 255).astype(np.uint8))
    names = [str(part) for part in range(parts) for _ in range(count)]
    opened = open_data(Arrays(np.stack(images), groups=names), preprocess=Preprocess((size, size)))
    return next(iter(opened.values())).train


def tiles(folder: Path, size: int) -> Dataset:
    """All normal images of MTD, grouped by tile."""
    (opened,) = open_data(folder, preprocess=Preprocess((size, size))).values()
    data = grouped(opened, ROOT / "data" / "mtd_tiles.csv")
    return data.subset(data.labels == 0)


def ungrouped(data: Dataset) -> Dataset:
    """The same images, of which nobody says that some show the same part."""
    return dataclasses.replace(data, records=tuple(record._replace(group="") for record in data.records))


def measured(data: Dataset, told: bool, options: Options) -> dict[str, float]:
    """Observed and stated rates over all splits, which are fitted and scored as classes of one program."""
    members = [
        Settings.of("mahalanobis_ad", image_size=data.image_size, fpr=options.fpr, seed=seed)
        for seed in range(2 if options.smoke else options.splits)
    ]
    names, unknown, trained, tested = sorted({*data.groups}), ungrouped(data), [], []
    for member in members:
        new = np.isin(data.groups, np.random.default_rng(member.seed).permutation(names)[: len(names) // 5])
        trained.append((data if told else unknown).subset(~new))
        tested.append(unknown.subset(new))
    frozen, execution = load_frozen(members[0]), Execution(cache=EmbeddingCache(), progress=progress())
    execution = configured(execution, members[0])
    for whole in (data, unknown):
        embed_all(members[0].build(data.image_size).embed, frozen, [whole], execution)
    learned = learn(members, trained, execution, frozen=frozen)
    scores = [np.empty(len(part)) for part in tested]
    execution = execution._replace(classes_per_step=learned.classes_per_step)
    for i, rows, batch in score_classes(learned.method, learned.state, frozen, tested, execution):
        scores[i][rows] = batch.image
    thresholds = [model.image_threshold for model in learned.models if model.image_threshold]
    rates = np.array([(part > t.value).mean() for part, t in zip(scores, thresholds, strict=True)])
    average, confident = (np.array([f(t) for t in thresholds]) for f in (lambda t: t.guaranteed_fpr, confident_fpr))
    return {
        "held_out_images": fmean(t.n for t in thresholds),
        "held_out_groups": fmean(t.n_groups for t in thresholds),
        "observed": float(rates.mean()),
        "stated_average": float(average.mean()),
        "stated_95": float(confident.mean()),
        "splits_within_95": float((rates <= confident).mean()),
    }


def main(options: Options) -> None:
    """Measures all sets."""
    size, rendered = (32, {"rendered metal": ("brushed_metal", 12, 3)}) if options.smoke else (SIZE, RENDERED)
    sets = {"magnetic tiles": tiles(options.mtd, size)} if options.mtd else {}
    sets |= {name: shots(*arguments, size) for name, arguments in rendered.items()}
    rows = {}
    for name, data in sets.items():
        rows[name] = {"images": len(data), "parts": len({*data.groups})}
        for label, told in (("told", True), ("not_told", False)):
            rows[name][label] = measured(data, told, options)
            print(name, label, {k: round(v, 3) for k, v in rows[name][label].items()}, flush=True)
        jax.clear_caches()
    record = {"experiment": "new_parts", "fpr": options.fpr, "splits": options.splits, "sets": rows, **origin()}
    write_json(options.results / "new_parts.json", record)


if __name__ == "__main__":
    start(main, Options)
