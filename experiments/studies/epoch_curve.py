"""The metrics of test images after every epoch of a recipe: how far the best epoch is from the last.

    python -m experiments.studies.epoch_curve fastflow_bottle --data BOTTLE_FOLDER --torch-python PYTHON
        --weights resnet18.tv_in1k.safetensors

This is no way to choose an epoch. But published numbers often belong to an epoch that was chosen on the test images:
anomalib's example configurations of FastFlow and CFA stop when pixel_AUROC has not risen for 3 or 5 epochs. The curve
shows the best value that such a rule would find here. With `--torch-python`, FrEIA's blocks are trained on the same
features instead, as a FastFlow of 3x3 convolutions: jaxad's curve must lie within the ups and downs of theirs. Writes
results/epochs_<recipe>.json after every epoch; the curve of the other blocks is kept. `--smoke` is the small variant
for the tests.
"""

import json
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from experiments.command import RESULTS, command_line, machine, progress, start
from experiments.opening import Opened, embedded, last_shuffled, open_recipe, states_by_epoch
from jaxad.data import Dataset
from jaxad.driver.embedding import EmbeddingCache
from jaxad.driver.execution import Execution
from jaxad.driver.program import Program
from jaxad.driver.scoring import score_all
from jaxad.files import read_json, write_json
from jaxad.metrics import auroc

PATIENCE = {"fastflow": 3, "cfa": 5}
"""Epochs without a rise after which anomalib stops a method; other methods get FastFlow's."""


@dataclass
class Options:
    """Score the test images after every epoch."""

    name: Annotated[str, tyro.conf.Positional]
    """A recipe of a method that ends with gradient steps and gives heat maps."""
    epochs: int | None = None
    """None: the recipe's."""
    data: str = "demo"
    """The data set: a folder, or whatever `jaxad fit` takes."""
    weights: Path | None = None
    torch_python: Path | None = None
    """A Python interpreter with torch and FrEIA, which trains FrEIA's blocks instead."""
    results: Path = RESULTS
    smoke: bool = False
    """A few small demo images and random weights."""


def maps_of_jaxad(opened: Opened, test: Dataset) -> Iterator[np.ndarray]:
    """Heat maps of the test images (n h w) after every epoch."""
    _, method, frozen, photographs, train, _ = opened
    finalize, execution = Program(method.stages[-1].finalize), Execution(cache=EmbeddingCache())
    for state in states_by_epoch(method, frozen, train, auxiliary=photographs, progress=progress()):
        fitted = finalize(jax.random.key(0), state, frozen)
        yield np.asarray(score_all(method, fitted, frozen, test, execution).pixel)


def maps_of_freia(python: Path, opened: Opened, test: Dataset) -> Iterator[np.ndarray]:
    """Heat maps (n h w) of FrEIA's blocks, trained on the same features, after every epoch.

    Args:
        python: An interpreter with torch and FrEIA.
        opened: A recipe of FastFlow.
        test: Its test images.

    Raises:
        ValueError: The interpreter fails.
    """
    stage = opened.method.stages[-1]
    with tempfile.TemporaryDirectory() as folder:
        for part, data in (("train", opened.train), ("test", test)):
            x = embedded(opened.method, opened.frozen, data)
            np.savez(f"{folder}/{part}.npz", **{layer: np.moveaxis(maps, -1, 1) for layer, maps in x.items()})
        settings = {"folder": folder, "size": test.image_size, "epochs": stage.epochs, "batch_size": stage.batch_size}
        script = Path(__file__).parents[1] / "bench" / "freia_fastflow.py"
        command = [str(python), str(script), json.dumps(settings)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                yield np.load(line.strip())
        if child.returncode:
            raise ValueError(f"freia_fastflow.py must end without an error, got exit code {child.returncode}")


def main(options: Options) -> None:
    """Trains, and writes the metrics of every epoch."""
    opened = open_recipe(
        options.name, epochs=options.epochs, data=options.data, weights=options.weights, smoke=options.smoke
    )
    settings, method, test = opened.settings, opened.method, opened.test
    if method.stages[-1] is not last_shuffled(method) or test is None:
        raise ValueError(f"the recipe must end with gradient steps and its data have a test split, got {options.name}")
    blocks = {k: v for k, v in settings.hyperparameters.items() if k not in ("epochs", "train_batch_size")}
    if options.torch_python is not None and (settings.method, blocks) != ("fastflow", {"conv3x3_only": True}):
        raise ValueError(f"FrEIA's blocks are those of a FastFlow of 8 3x3 couplings, got {options.name}: {blocks}")
    masks = test.masks(range(len(test)))
    if masks is None:
        raise ValueError(f"the data must have masks, got none in {options.data}")
    record = {
        "experiment": f"epochs_{options.name}",
        "method": settings.method,
        "hyperparameters": {k: v for k, v in settings.hyperparameters.items() if k != "epochs"},
        "images": {"learned": len(opened.train), "test": len(test)},
        **machine(),
    }
    path = options.results / f"epochs_{options.name}.json"
    old = read_json(path) if path.exists() else {}
    curves = old["curves"] if record.items() <= old.items() else {}
    if options.torch_python is None:
        library, maps = "jaxad", maps_of_jaxad(opened, test)
    else:
        library, maps = "FrEIA", maps_of_freia(options.torch_python, opened, test)
    defects = (masks > 0).ravel().astype(int)
    curve: dict[str, list[float]] = {"image_AUROC": [], "pixel_AUROC": []}
    for pixel in maps:
        curve["image_AUROC"].append(auroc(pixel.max((1, 2)), test.labels))
        curve["pixel_AUROC"].append(auroc(pixel.ravel(), defects))
        best = stopped(curve["pixel_AUROC"], PATIENCE.get(settings.method, PATIENCE["fastflow"]))
        curves[library] = curve | {"stopped": best, "command": command_line()}
        write_json(path, record | {"curves": curves})
        print(f"\n{library}", {k: round(v[-1], 4) for k, v in curve.items()}, flush=True)


def stopped(values: list[float], patience: int) -> float:
    """The best value until there is no rise for `patience` epochs."""
    best = 0
    for epoch, value in enumerate(values):
        if value > values[best]:
            best = epoch
        if epoch - best >= patience:
            break
    return values[best]


if __name__ == "__main__":
    start(main, Options)
