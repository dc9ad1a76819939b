"""What test images say after every epoch of a recipe: how far a best test epoch is from the last; never to choose by.

    python experiments/epoch_curve.py fastflow_bottle --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors
        --torch-python PYTHON

Published numbers are often of an epoch that was chosen on the test images: anomalib's example configurations of
FastFlow and CFA stop when their pixel_AUROC has not risen for 3 or 5 epochs. The curve shows the best value that such a
rule would have met here. With `--torch-python`, FrEIA's blocks are trained instead, on the same features, as a FastFlow
of 3x3 convolutions: what both curves share is no mistake of jaxad's blocks. Writes results/epochs_<recipe>.json after
every epoch; a curve of the other blocks stays there. `--smoke` is the small variant that the tests run.
"""

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

import loops
import run
from command import machine, start
from jaxad.files import read_json, write_json
from jaxad.base import Frozen, Method, PyTree
from jaxad.metrics import auroc
from jaxad.driver.program import Program

PATIENCE = {"fastflow": 3, "cfa": 5}
"""Epochs without a rise after which anomalib stops a method; others are taken for a FastFlow."""


@dataclass
class Options:
    """Score the test images after every epoch."""

    name: Annotated[str, tyro.conf.Positional]
    """A recipe of a method whose last stage is of gradient steps and which draws heat maps."""
    epochs: int | None = None
    """None: the recipe's."""
    data: str = "demo"
    weights: Path | None = None
    torch_python: Path | None = None
    """An interpreter with torch and FrEIA, whose blocks are trained instead, for a FastFlow."""
    results: Path = field(default_factory=lambda: Path(__file__).parent / "results")
    smoke: bool = False
    """A few small demo images and random weights."""


def of_jaxad(name: str, method: Method, frozen: Frozen, learn: PyTree, test: PyTree) -> Iterator[np.ndarray]:
    """Heat maps of the test images after every epoch."""
    finish, score, n = Program(method.stages[-1].finalize), Program(method.score), loops.length(test)
    for state in loops.after_epochs(method, frozen, learn, functools.partial(run.progress(), name)):
        final = finish(jax.random.key(0), state, frozen)
        parts = [loops.batch_of(test, range(i, min(i + loops.PART, n))).x for i in range(0, n, loops.PART)]
        yield np.concatenate([score(final, frozen, part).pixel for part in parts])


def of_freia(python: Path, method: dict, size: tuple[int, int], learn: PyTree, test: PyTree) -> Iterator[np.ndarray]:
    """Heat maps of FrEIA's blocks, trained on the same features."""
    with tempfile.TemporaryDirectory() as folder:
        for part, x in (("learn", learn), ("test", test)):
            np.savez(f"{folder}/{part}.npz", **{layer: np.moveaxis(maps, -1, 1) for layer, maps in x.items()})
        given = method | {"folder": folder, "size": size}
        command = [str(python), str(Path(__file__).with_name("freia_fastflow.py")), json.dumps(given)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                yield np.load(line.strip())
        if child.returncode:
            raise ValueError(f"freia_fastflow.py must end well, got exit code {child.returncode}")


def main(options: Options) -> None:
    """Trains, and writes the metrics of every epoch."""
    opened = loops.opened(options.name, options.epochs, options.data, options.weights, options.smoke)
    detector, frozen, (train, test) = opened
    method = detector.method
    if not method.stages[-1].shuffle or test is None:
        raise ValueError(f"the recipe must end with gradient steps and its data have a test split, got {options.name}")
    blocks = {k: v for k, v in detector.hyperparameters.items() if k not in ("epochs", "train_batch_size")}
    if options.torch_python is not None and (detector.method_name, blocks) != ("fastflow", {"conv3x3_only": True}):
        raise ValueError(f"FrEIA's blocks are those of a FastFlow of 8 3x3 couplings, got {options.name}: {blocks}")
    learn, foreign = (loops.embedded(method, frozen, part) for part in (train, test))
    record = {
        "experiment": f"epochs_{options.name}",
        "method": detector.method_name,
        "hyperparameters": {k: v for k, v in detector.hyperparameters.items() if k != "epochs"},
        "images": {"learned": len(train), "test": len(test)},
        **machine(),
    }
    path = options.results / f"epochs_{options.name}.json"
    old = read_json(path) if path.exists() else {}
    curves = old["curves"] if record.items() <= old.items() else {}  # of the other blocks on the same images
    if options.torch_python is None:
        of, maps = "jaxad", of_jaxad(options.name, method, frozen, learn, foreign)
    else:
        trained = {"epochs": method.stages[-1].epochs, "batch_size": method.stages[-1].batch_size}
        of, maps = "FrEIA", of_freia(options.torch_python, trained, test.image_size, learn, foreign)
    masks = test.masks(range(len(test)))
    if masks is None:
        raise ValueError(f"the data must have masks, got none in {options.data}")
    defects = (masks > 0).ravel().astype(int)
    curve: dict[str, list[float]] = {"image_AUROC": [], "pixel_AUROC": []}
    for pixel in maps:
        curve["image_AUROC"].append(auroc(pixel.max((1, 2)), test.labels))
        curve["pixel_AUROC"].append(auroc(pixel.ravel(), defects))
        best = stopped(curve["pixel_AUROC"], PATIENCE.get(detector.method_name, PATIENCE["fastflow"]))
        curves[of] = curve | {"stopped": best, "command": " ".join(["python", *sys.argv])}
        write_json(path, record | {"curves": curves})
        print(f"\n{of}", {k: round(v[-1], 4) for k, v in curve.items()}, flush=True)


def stopped(values: list[float], patience: int) -> float:
    """The best value up to where it has not risen for so many epochs."""
    best = 0
    for epoch, value in enumerate(values):
        if value > values[best]:
            best = epoch
        if epoch - best >= patience:
            break
    return values[best]


if __name__ == "__main__":
    start(main, Options)
