"""Held-out loss of a recipe's method after every epoch, for several learning rates: what to choose both by.

    python experiments/select_rate.py cflow_mtd --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors

With `--vary` another hyper-parameter than the learning rate has several values. All images are normal ones of the
training split; test images are not looked at. Writes results/select_<recipe>.json, or select_<recipe>_<vary>.json.
`--smoke` is the small variant that the tests run.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

import loops
import run
from command import origin, start
from jaxad.files import write_json
from jaxad.base import Frozen, Method, PyTree
from jaxad.driver.program import Program

STILL = 1e-12
"""A learning rate that learns nothing: the loss of a step with it is that before the step."""


@dataclass
class Options:
    """Compare learning rates and numbers of epochs."""

    name: Annotated[str, tyro.conf.Positional]
    """A recipe of a method with a learning rate."""
    rates: tuple[float, ...] = ()
    """Learning rates, or values of what varies; none: the recipe's."""
    vary: str = "learning_rate"
    """The hyper-parameter that varies, one that is a number and need not be whole."""
    epochs: int | None = None
    """At most; none: the recipe's."""
    data: str = "demo"
    weights: Path | None = None
    auxiliary: Path | None = None
    """A folder of photographs of other things, for recipes that say so."""
    learn: int = 140
    """Images that are learned from."""
    hold_out: int = 32
    """Others, whose loss counts."""
    results: Path = field(default_factory=lambda: Path(__file__).parent / "results")
    smoke: bool = False
    """A few small demo images and random weights."""


def curve(name: str, method: Method, still: Method, frozen: Frozen, learn: PyTree, held_out: PyTree) -> list[float]:
    """The loss of what is held out after every epoch of the gradient stage, the last that shuffles."""
    i = max(i for i, stage in enumerate(method.stages) if stage.shuffle)
    look, m = Program(still.stages[i].update), loops.length(held_out)
    size = min(method.stages[i].batch_size or loops.PART, m)
    parts = [loops.batch_of(held_out, range(k, k + size)) for k in range(0, m // size * size, size)]

    def loss(state: PyTree) -> float:
        return float(np.mean([look(jax.random.key(0), state, frozen, part)[1]["loss"] for part in parts]))

    states = loops.after_epochs(method, frozen, learn, functools.partial(run.progress(), name))
    return [loss(state) for state in states]


def main(options: Options) -> None:
    """Trains with every rate and writes the losses."""
    opened = loops.opened(options.name, options.epochs, options.data, options.weights, options.smoke, options.auxiliary)
    detector, frozen, (data, _) = opened
    if options.learn + options.hold_out > len(data):
        raise ValueError(
            f"learn + hold_out must be at most the {len(data)} images, got {options.learn + options.hold_out}"
        )
    order = np.random.default_rng(0).permutation(len(data))
    ends = options.learn, options.learn + options.hold_out
    learn, held_out = (data.subset(np.sort(rows)) for rows in (order[: ends[0]], order[ends[0] : ends[1]]))
    x = [loops.embedded(detector.method, frozen, part) for part in (learn, held_out)]
    losses = {}
    for rate in options.rates or (None,):
        varied = detector if rate is None else detector.varied(options.vary, rate)
        label = "recipe's" if rate is None else f"{rate:g}"
        still = varied.varied("learning_rate", STILL).method
        losses[label] = curve(f"{options.name}, {options.vary} {label}", varied.method, still, frozen, *x)
        print(label, [round(loss, 4) for loss in losses[label]], flush=True)
    experiment = f"select_{options.name}" + ("" if options.vary == "learning_rate" else f"_{options.vary}")
    record = {
        "experiment": experiment,
        "method": detector.method_name,
        "hyperparameters": detector.hyperparameters,
        "varied": options.vary,
        "images": {"learned": len(learn), "held_out": len(held_out)},
        "held_out_loss": losses,
        **origin(),
    }
    write_json(options.results / f"{experiment}.json", record)


if __name__ == "__main__":
    start(main, Options)
