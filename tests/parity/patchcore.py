"""PatchCore with re-weighted scores against anomalib's PatchcoreModel, with features in place of its backbone.

The coreset starts with jaxad's first patch, in anomalib's random projection. The heat map has the size of the features,
because anomalib repeats patches in larger ones; golden/patchcore-official.npz holds an upsampled one. As in the
official code, and other than in anomalib, the smoothing of the heat map (scipy's) repeats the border.
"""

import importlib
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from jaxad.base import Method
from jaxad.methods.patchcore import patchcore
from tests.parity.golden import Golden, normal
from tests.parity.steps import KEY, batch_of, nhwc

SHAPES = {"layer2": (5, 8, 8), "layer3": (6, 4, 4)}


def fit_and_score(method: Method, x: dict[str, jax.Array], train: int) -> Any:
    """The state after a fit on the first images, and the scores of the others."""

    @jax.jit
    def run(train: Any, test: Any) -> Any:
        state, _ = stage.update(KEY, stage.init(KEY, None, None, train), None, batch_of(train))
        state = stage.finalize(KEY, state, None)
        return state, method.score(state, None, test)

    (stage,) = method.stages
    return run(*({layer: maps[part] for layer, maps in x.items()} for part in (slice(train), slice(train, None))))


def ours(golden: Golden) -> dict[str, Any]:
    method = patchcore(backbone="resnet18", image_size=(8, 8), scoring="paper", projection_dim=8)
    project = jnp.asarray(golden.given["projection"].T)
    x = {layer: nhwc(normal(f"features {layer}", 10, *shape)) for layer, shape in SHAPES.items()}
    with mock.patch.object(importlib.import_module(patchcore.__module__), "_projection", lambda *_: project):
        state, scores = fit_and_score(method, x, 7)
    return {"bank": state.bank[: int(state.size)], "heat map": scores.pixel, "score": scores.image}
