"""SPADE against the code that its docstring names, whose `main` ran with a data set and a network of these features.

Differences that were taken out of it: distances are squared (its torch.sqrt and torch.pairwise_distance were replaced;
the latter sums over channels, as in the torch of its time), and all three stages are the stacked pyramid, so that its
mean of three heat maps is the one of the stacked features. A grid of 10 x 10 fills its hundreds of pixels. Features are
multiples of 1/8, which half precision holds exactly.
"""

from typing import Any

import jax
import numpy as np

from jaxad.methods.spade import spade
from tests.parity.golden import Golden, normal
from tests.parity.steps import KEY, batch_of, nhwc

SHAPES = {"layer1": (3, 10, 10), "layer2": (4, 5, 5), "layer4": (6, 2, 2)}


def ours(golden: Golden) -> dict[str, Any]:
    del golden
    method = spade(backbone="resnet18", layers=("layer1", "layer2"), num_neighbors=4)
    stage = method.stages[0]
    x = {layer: nhwc(np.round(8 * normal(f"features {layer}", 10, *shape)) / 8) for layer, shape in SHAPES.items()}
    train, test = ({layer: maps[part] for layer, maps in x.items()} for part in (slice(7), slice(7, 10)))

    @jax.jit
    def run(train: Any, test: Any) -> Any:
        state, _ = stage.update(KEY, stage.init(KEY, None, None, train), None, batch_of(train))
        return method.score(stage.finalize(KEY, state, None), None, test)

    scores = run(train, test)
    return {"heat map": scores.pixel, "score": scores.image}
