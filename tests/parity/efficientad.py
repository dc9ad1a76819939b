"""EfficientAD against anomalib's EfficientAdModel, with narrow patch networks at 256 px.

Both draw the same: in every step another kind and factor of jitter and another photograph, and dropout of what `normal`
gives. The errors are compared on the grid of pixels, without anomalib's padding; their scale is compared in
efficientad_calibration.py.
"""

import re
from statistics import NormalDist
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np

from jaxad.backbones import pdn
from jaxad.methods.efficientad import EfficientadNetworks, efficientad
from jaxad.ops.heatmap import upsample_blur
from jaxad.synthesis import color
from tests.parity.golden import Golden, normal, pixels
from tests.parity.steps import KEY, batch_of, from_torch, gradient, shapes_of, to_torch, under

SIZE = 128
PROGRESS, KINDS, DRAWS = (0.0, 0.9, 0.95), np.int32([2, 1, 0]), np.float32([0.1, 0.6, 0.9])
"""Of every step: the share of steps that are done, what is jittered and which photograph, and where uniform draws lie
in their range."""
LUMA = (0.2989, 0.587, 0.114)
"""torchvision's, for tensors."""
NETWORK = pdn.make("narrow_pdn", ((4, 8), (4, 16), (3, 16), (4, pdn.OUT)))


def name_of(path: str) -> str:
    """A leaf of the parameters -> its tensor in torch."""
    path = path.replace("kernel", "weight").replace("/", ".")
    conv = re.fullmatch(r"autoencoder\.Conv_(\d+)\.(\w+)", path)
    if conv is None:
        return path
    number = int(conv[1])
    return f"ae.encoder.enconv{number + 1}.{conv[2]}" if number < 6 else f"ae.decoder.deconv{number - 5}.{conv[2]}"


def teacher() -> Any:
    """The teacher's weights."""
    shapes = jax.eval_shape(NETWORK.init, KEY)["params"]
    params = from_torch(shapes, lambda path: f"teacher.{name_of(path)}")
    return NETWORK.fold(to_torch(params, name_of))


def ours(golden: Golden) -> dict[str, Any]:
    method, frozen = efficientad(backbone=NETWORK, image_size=(SIZE, SIZE)), teacher()
    measure, train, calibrate = method.stages
    embed = jax.jit(method.embed)
    x = embed(frozen, pixels("image", 3, SIZE, SIZE, 3))
    moments, _ = jax.jit(measure.update)(KEY, shapes_of(measure, x), frozen, batch_of(x))
    mean, deviation = jax.jit(measure.finalize)(KEY, moments, frozen)

    @jax.jit
    def step(training: Any, batch: Any, kind: Any, draw: Any, dropout: dict[int, Any]) -> tuple[Any, Any]:
        def randint(key: Any, shape: Any, *limits: Any) -> Any:
            return jnp.broadcast_to(kind, shape)

        def uniform(key: Any, shape: Any, *others: Any, minval: float = 0.0, maxval: float = 1.0) -> Any:
            return jnp.broadcast_to(minval + draw * (maxval - minval), shape)

        def bernoulli(key: Any, p: float, shape: Any) -> Any:
            return dropout[shape[1]] < NormalDist().inv_cdf(p)

        with (
            patch.multiple(jax.random, randint=randint, uniform=uniform, bernoulli=bernoulli),
            patch.object(color, "LUMA", LUMA),
        ):
            return train.update(KEY, training, frozen, batch)

    parts = [{name: np.asarray(leaf[i : i + 1]) for name, leaf in x.items()} for i in range(3)]
    training = shapes_of(train, parts[0], (mean, deviation), frozen)
    params = from_torch(training.model.params, name_of)
    training = training._replace(model=EfficientadNetworks(params, **golden.given))
    states, losses = [training], []
    dropout = {h: normal(f"dropout {h}", 1, h, h, 64) for h in (2, 5, 8, 17, 32, 64)}
    photographs = pixels("photographs", 3, SIZE, SIZE, 3)
    for part, progress, kind, draw in zip(parts, PROGRESS, KINDS, DRAWS, strict=True):
        batch = batch_of(part, progress, auxiliary=photographs)
        training, metrics = step(states[-1], batch, kind, draw, dropout)
        states.append(training)
        losses.append(metrics["loss"])
    model = states[-1].model
    state = shapes_of(calibrate, parts[0], model, frozen)._replace(**model._asdict())
    state, _ = jax.jit(calibrate.update)(KEY, state, frozen, batch_of(parts[0]))
    errors = upsample_blur(jnp.moveaxis(state.errors[0], -1, 0), (SIZE, SIZE), 0.0)
    return {
        "mean and deviation/mean": mean,
        "mean and deviation/deviation": deviation,
        "loss": np.asarray(losses),
        **under("gradient", to_torch(gradient(states[1]), name_of)),
        **under("parameters after 3 steps", to_torch(model.params, name_of)),
        "errors/student": errors[0],
        "errors/autoencoder": errors[1],
    }
