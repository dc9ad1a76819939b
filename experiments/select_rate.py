"""Held-out loss of a recipe's method after every epoch, for several learning rates: what to choose both by.

    python experiments/select_rate.py cflow_mtd --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors

All images are normal ones of the training split; test images are not looked at. Writes results/select_<recipe>.json.
`--smoke` is the small variant that the tests run.
"""

import inspect
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent))

import bench_flows
import run

import jaxad
from jaxad.artifact import write_json
from jaxad.base import Batch, Frozen, Method
from jaxad.data import Dataset, open_data
from jaxad.methods import METHODS
from jaxad.program import Program

STILL = 1e-12
"""A learning rate that learns nothing: the loss of a step with it is that before the step."""


@dataclass
class Options:
    """Compare learning rates and numbers of epochs."""

    name: Annotated[str, tyro.conf.Positional]
    """A recipe of a method with a learning rate."""
    rates: tuple[float, ...] = ()
    """Learning rates; none: the recipe's."""
    epochs: int | None = None
    """At most; none: the recipe's."""
    data: str = "demo"
    weights: Path | None = None
    learn: int = 140
    """Images that are learned from."""
    hold_out: int = 32
    """Others, whose loss counts."""
    results: Path = field(default_factory=lambda: Path(__file__).parent / "results")
    smoke: bool = False
    """A few small demo images and random weights."""


def embedded(method: Method, frozen: Frozen, data: Dataset, size: int = 16) -> Any:
    """What the method makes of all images."""
    embed = Program(method.embed)
    parts = [embed(frozen, data.images(range(i, min(i + size, len(data))))) for i in range(0, len(data), size)]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def batch_of(x: Any, rows: np.ndarray, progress: float = 0.0) -> Batch:
    """Some of the images, all of them valid."""
    taken = jax.tree.map(lambda leaf: jnp.asarray(leaf[rows]), x)
    batch = bench_flows.batch_of(taken, len(rows))
    return batch._replace(index=jnp.asarray(rows, jnp.int32), progress=jnp.float32(progress))


def curve(name: str, method: Method, still: Method, frozen: Frozen, learn: Any, held_out: Any) -> list[float]:
    """The loss of what is held out after every epoch of the gradient stage, the last that shuffles."""
    leaves = jax.tree.leaves(learn)
    n, m = len(leaves[0]), len(jax.tree.leaves(held_out)[0])
    spec = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), learn)
    state, order, losses = method.init(jax.random.key(0), frozen, spec), np.random.default_rng(0), []
    last = max(i for i, stage in enumerate(method.stages) if stage.shuffle)
    for i, stage in enumerate(method.stages[: last + 1]):
        update, look, size = Program(stage.update), Program(still.stages[i].update), stage.batch_size or 16
        size = min(size, n, m)
        for epoch in range(stage.epochs):
            rows = order.permutation(n) if stage.shuffle else np.arange(n)
            steps = n // size
            for step in range(steps):
                key = jax.random.key(epoch * steps + step)
                part = batch_of(learn, rows[step * size : (step + 1) * size], (epoch + step / steps) / stage.epochs)
                state, _ = update(key, state, frozen, part)
                run.progress(f"{name}, {stage.name}", (epoch * steps + step + 1) * size, stage.epochs * steps * size)
            if i == last:
                parts = [batch_of(held_out, np.arange(k, k + size)) for k in range(0, m // size * size, size)]
                found = [look(jax.random.key(0), state, frozen, part)[1]["loss"] for part in parts]
                losses.append(float(np.mean(found)))
        if i < last:
            state = stage.finalize(jax.random.key(0), state, frozen)
    return losses


def main(options: Options) -> None:
    """Trains with every rate and writes the losses."""
    known = run.all_recipes()
    if (
        options.name not in known
        or "learning_rate" not in inspect.signature(METHODS[known[options.name].method]).parameters
    ):
        raise SystemExit(f"the recipe must be one of a method with a learning rate, got {options.name}")
    recipe = known[options.name]
    hyperparameters = dict(recipe.hyperparameters)
    if options.epochs is not None:
        hyperparameters["epochs"] = options.epochs
    detector = jaxad.Detector(
        recipe.method,
        backbone="resnet18" if options.smoke else recipe.backbone,
        weights=None if options.smoke else options.weights,
        image_size=64 if options.smoke else recipe.image_size,
        center_crop=None if options.smoke else recipe.center_crop,
        **hyperparameters,
    )
    if options.smoke:
        detector.frozen = jaxad.backbones.backbone("resnet18").init(jax.random.key(0))
    frozen = detector.load_frozen()
    data = next(
        iter(open_data("demo" if options.smoke else options.data, preprocess=detector.preprocess).values())
    ).train
    assert data is not None
    if options.learn + options.hold_out > len(data):
        raise SystemExit(
            f"learn + hold_out must be at most the {len(data)} images, got {options.learn + options.hold_out}"
        )
    order = np.random.default_rng(0).permutation(len(data))
    ends = options.learn, options.learn + options.hold_out
    learn, held_out = (data.subset(np.sort(rows)) for rows in (order[: ends[0]], order[ends[0] : ends[1]]))
    x = [embedded(detector.method, frozen, part) for part in (learn, held_out)]
    still = detector.varied("learning_rate", STILL).method
    losses = {}
    for rate in options.rates or (None,):
        method = detector.method if rate is None else detector.varied("learning_rate", rate).method
        label = "recipe's" if rate is None else f"{rate:g}"
        losses[label] = curve(f"{options.name}, learning rate {label}", method, still, frozen, *x)
        print(label, [round(loss, 4) for loss in losses[label]], flush=True)
    record = {
        "experiment": f"select_{options.name}",
        "method": recipe.method,
        "hyperparameters": hyperparameters,
        "images": {"learned": len(learn), "held_out": len(held_out)},
        "held_out_loss": losses,
        "device": jax.devices()[0].device_kind,
        "versions": {"jaxad": jaxad.__version__, "jax": jax.__version__, "numpy": np.__version__},
        "command": " ".join(["python", *sys.argv]),
    }
    write_json(options.results / f"select_{options.name}.json", record)


if __name__ == "__main__":
    main(tyro.cli(Options))
