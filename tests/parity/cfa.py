"""CFA against anomalib's CfaModel, CfaLoss and optimizer, with features in place of its backbone.

As in the official code, and other than in anomalib, the radius of the hyperspheres is learned, and the smoothing of the
heat map (scipy's) repeats the border. The radius starts large enough for both terms of the loss to count, and steps and
weight decay are larger than by default, so that they show.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxad.methods.cfa import cfa
from tests.parity.golden import Golden, normal
from tests.parity.steps import KEY, batch_of, follow, from_torch, gradient, nhwc, shapes_of, to_torch, under

SHAPES, RADIUS = {"layer1": (3, 8, 8), "layer2": (2, 4, 4), "layer3": (2, 2, 2)}, 0.6


def name_of(path: str) -> str:
    return f"layer.conv2d.{'weight' if path.endswith('kernel') else 'bias'}" if path != "radius" else path


def ours(golden: Golden) -> dict[str, Any]:
    method = cfa(backbone="resnet18", image_size=(16, 16), learning_rate=1e-2, weight_decay=0.1)
    defaults = inspect.signature(cfa).parameters
    memorize, train = method.stages
    x = {layer: nhwc(normal(f"features {layer}", 6, *shape)) for layer, shape in SHAPES.items()}
    first, second = ({layer: maps[half] for layer, maps in x.items()} for half in (slice(3), slice(3, 6)))
    sums = shapes_of(memorize, x)
    sums = sums._replace(descriptor=from_torch(sums.descriptor, name_of))

    @jax.jit
    def start(sums: Any) -> Any:
        for part in (first, second):
            sums, _ = memorize.update(KEY, sums, None, batch_of(part))
        return train.init(KEY, memorize.finalize(KEY, sums, None), None, None)

    training = start(sums)
    large = training.model._replace(params=training.model.params | {"radius": jnp.float32(RADIUS)})
    states, losses = follow(train, training._replace(model=large), [batch_of(part) for part in (first, second, second)])
    scores = jax.jit(lambda state: method.score(train.finalize(KEY, state, None), None, first))(states[-1])
    return {
        "memory": training.model.memory.centers,
        **under("gradient", to_torch(gradient(states[0]), name_of)),
        "settings": [
            *(defaults[k].default for k in ("learning_rate", "weight_decay")),
            training.model.params["radius"],
        ],
        "loss": np.asarray(losses),
        **under("parameters after 3 steps", to_torch(states[-1].model.params, name_of)),
        "heat map": scores.pixel,
        "score": scores.image,
    }
