"""PaDiM against anomalib's PadimModel, with features in place of its backbone, of fewer images than channels.

anomalib adds another 1e-5 to the diagonal of the covariances. As in the method's reference, and other than in anomalib,
the smoothing of the heat map (scipy's) repeats the border.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxad.methods.padim import padim
from tests.parity.golden import Golden, normal
from tests.parity.steps import KEY, batch_of, nhwc, shapes_of

SHAPES = {"layer1": (4, 8, 8), "layer2": (5, 4, 4), "layer3": (6, 2, 2)}


def ours(golden: Golden) -> dict[str, Any]:
    method = padim(backbone="resnet18", image_size=(32, 32), n_features=9, epsilon=0.01 + 1e-5)
    stage = method.stages[0]
    x = {layer: nhwc(normal(f"features {layer}", 9, *shape)) for layer, shape in SHAPES.items()}
    parts = slice(4), slice(4, 6), slice(6, 9)
    first, second, test = ({layer: maps[part] for layer, maps in x.items()} for part in parts)

    @jax.jit
    def run(state: Any) -> Any:
        for part in (first, second):
            state, _ = stage.update(KEY, state, None, batch_of(part))
        state = stage.finalize(KEY, state, None)
        return state, method.score(state, None, test)

    state, scores = run(shapes_of(stage, x)._replace(channels=jnp.asarray(golden.given["channels"])))
    factor = np.asarray(state.factor, np.float64)
    return {
        "mean": state.mean,
        "inverse covariance": np.linalg.inv(factor @ factor.swapaxes(1, 2)),
        "heat map": scores.pixel,
        "score": scores.image,
    }
