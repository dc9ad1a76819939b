"""EfficientAD's scale and heat map against the implementation of nelson1425.

From github.com/nelson1425/EfficientAD at fcab5146f84ae17597044ad5ddf1656ccf805401 these were called, at its 256 px:
`teacher_normalization` and `map_normalization` on two held-out images, and `test` on two others, whose written maps are
compared. Its networks come from `get_pdn_small`, with fewer channels in hidden layers, and `get_autoencoder`; their
weights are those of the convolutions of anomalib's in the same order.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxad.methods.efficientad import EfficientadNetworks, efficientad
from jaxad.training.holdout import HOLDOUT_STEP
from tests.parity.efficientad import NETWORK, name_of, teacher
from tests.parity.golden import Golden, pixels
from tests.parity.steps import KEY, batch_of, from_torch, shapes_of


def ours(golden: Golden) -> dict[str, Any]:
    del golden
    method, frozen = efficientad(backbone=NETWORK), teacher()
    measure, train, calibrate = method.stages
    embed, score = jax.jit(method.embed), jax.jit(method.score)
    held_out, tested = (embed(frozen, pixels(name, 2, 256, 256, 3)) for name in ("held out", "tested"))
    moments, _ = jax.jit(measure.update)(KEY, shapes_of(measure, held_out), frozen, batch_of(held_out))
    mean, deviation = jax.jit(measure.finalize)(KEY, moments, frozen)
    params = from_torch(shapes_of(train, held_out, (mean, deviation), frozen).model.params, name_of)
    images = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((HOLDOUT_STEP + 1, *leaf.shape[1:]), leaf.dtype), held_out)
    model = EfficientadNetworks(params, mean, deviation)
    state = shapes_of(calibrate, images, model, frozen)._replace(**model._asdict())
    batch = batch_of(held_out, index=jnp.asarray([0, HOLDOUT_STEP], jnp.int32))
    state, _ = jax.jit(calibrate.update)(KEY, state, frozen, batch)
    state = jax.jit(calibrate.finalize)(KEY, state, frozen)
    scores = score(state, frozen, tested)
    return {
        "mean and deviation/mean": mean,
        "mean and deviation/deviation": deviation,
        "quantiles/low": state.low,
        "quantiles/high": state.high,
        "heat map": scores.pixel,
        "score": scores.image,
    }
