"""The held-out loss of a recipe after every epoch, for several learning rates, to choose rate and epochs by.

    python -m experiments.studies.select_rate cflow_mtd --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors

With `--vary`, another hyperparameter than the learning rate takes several values. All images are normal ones of the
training split; no test image is read. The loss is that of the networks as scoring calls them: batch norms use their
running statistics, not those of the held-out images. Writes results/select_<recipe>.json, or
select_<recipe>_<vary>.json. `--smoke` is the small variant for the tests.
"""

import contextlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from flax import linen as nn

from experiments.command import RESULTS, origin, progress, start
from experiments.opening import batch_of, embedded, last_shuffled, open_recipe, states_by_epoch
from jaxad.base import Frozen, PyTree, State
from jaxad.data import Dataset
from jaxad.driver.program import Program
from jaxad.files import write_json
from jaxad.methods import METHODS
from jaxad.settings import Settings

NEGLIGIBLE = 1e-12
"""A learning rate that changes nothing: the loss of a step with it is that of the state before the step."""


@dataclass
class Options:
    """Compare learning rates and numbers of epochs."""

    name: Annotated[str, tyro.conf.Positional]
    """A recipe of a method with a learning rate."""
    rates: tuple[float, ...] = ()
    """Learning rates, or values of what varies; none: the recipe's."""
    vary: str = "learning_rate"
    """The hyperparameter that varies; it takes floats."""
    epochs: int | None = None
    """At most; None: the recipe's."""
    data: str = "demo"
    """The data set: a folder, or whatever `jaxad fit` takes."""
    weights: Path | None = None
    auxiliary: Path | None = None
    """A folder of photographs of other things, for recipes that ask for one."""
    learn: int = 140
    """Images to train on."""
    hold_out: int = 32
    """Other images, for the loss."""
    results: Path = RESULTS
    smoke: bool = False
    """A few small demo images and random weights."""


def hold_out(data: Dataset, learn: int, held_out: int) -> tuple[Dataset, Dataset]:
    """So many images to train on, and other ones for the loss, at random.

    Raises:
        ValueError: There are not as many images.
    """
    if learn + held_out > len(data):
        raise ValueError(f"learn + hold_out must be at most the {len(data)} images, got {learn + held_out}")
    order = np.random.default_rng(0).permutation(len(data))
    return data.subset(np.sort(order[:learn])), data.subset(np.sort(order[learn : learn + held_out]))


def evaluation_mode() -> contextlib.AbstractContextManager:
    """A context in which networks are traced as scoring calls them, wherever a loss says `train=True`."""

    def call(function: Any, arguments: tuple, keywords: dict[str, Any], context: Any) -> Any:
        del context
        return function(*arguments, **keywords | ({"train": False} if "train" in keywords else {}))

    return nn.intercept_methods(call)


def deployed_loss(settings: Settings, image_size: tuple[int, int]) -> Program:
    """(key, state, frozen, batch) -> a new state and diagnostics: the loss of the networks as they are deployed.

    Args:
        settings: What is trained.
        image_size: (height, width).
    """
    for name in inspect.signature(METHODS[settings.method]).parameters:
        if name.endswith("learning_rate"):
            settings = settings.varied(name, NEGLIGIBLE)
    return Program(last_shuffled(settings.build(image_size)).update, ambient=evaluation_mode)


def held_out_losses(settings: Settings, frozen: Frozen, photographs: Any, train: Dataset, x: PyTree) -> list[float]:
    """The loss of held-out images after every epoch of the last stage that trains by gradient steps.

    Args:
        settings: What is trained.
        frozen: Its pretrained weights.
        photographs: Auxiliary images, uint8 n h w 3, or None.
        train: The training images.
        x: The embeddings of the held-out images.
    """
    method = settings.build(train.image_size)
    evaluate = deployed_loss(settings, train.image_size)
    n = len(jax.tree.leaves(x)[0])
    size = min(last_shuffled(method).batch_size or n, n)
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i : i + size], x) for i in range(0, n // size * size, size)]
    batches = [batch_of(part, photographs, progress=0.0) for part in parts]

    def loss(state: State) -> float:
        return float(np.mean([evaluate(jax.random.key(0), state, frozen, batch)[1]["loss"] for batch in batches]))

    states = states_by_epoch(method, frozen, train, auxiliary=photographs, progress=progress())
    return [loss(state) for state in states]


def main(options: Options) -> None:
    """Trains with every rate and writes the losses."""
    settings, method, frozen, photographs, data, _ = open_recipe(
        options.name,
        epochs=options.epochs,
        data=options.data,
        weights=options.weights,
        auxiliary=options.auxiliary,
        smoke=options.smoke,
    )
    train, held_out = hold_out(data, options.learn, options.hold_out)
    x = embedded(method, frozen, held_out)
    losses = {}
    for rate in options.rates or (None,):
        varied = settings if rate is None else settings.varied(options.vary, rate)
        label = "recipe's" if rate is None else f"{rate:g}"
        losses[label] = held_out_losses(varied, frozen, photographs, train, x)
        print(label, [round(loss, 4) for loss in losses[label]], flush=True)
    experiment = f"select_{options.name}" + ("" if options.vary == "learning_rate" else f"_{options.vary}")
    record = {
        "experiment": experiment,
        "method": settings.method,
        "hyperparameters": dict(settings.hyperparameters),
        "varied": options.vary,
        "images": {"learned": len(train), "held_out": len(held_out)},
        "held_out_loss": losses,
        **origin(),
    }
    write_json(options.results / f"{experiment}.json", record)


if __name__ == "__main__":
    start(main, Options)
