"""PatchCore with the official scores and all patches against the code of its authors.

Their PatchCore (load, fit, predict) ran with a backbone that gives these features, IdentitySampler and FaissNN, of
whose squared distances the square root was taken, because jaxad's scores are distances. Both stages have as many
channels as `pretrain_embed_dimension`, and `target_embed_dimension` is their sum, so that no channels are averaged.
"""

from typing import Any

import numpy as np

from jaxad.methods.patchcore import patchcore
from tests.parity.golden import Golden, normal
from tests.parity.patchcore import fit_and_score
from tests.parity.steps import nhwc

SHAPES = {"layer2": (6, 8, 8), "layer3": (6, 4, 4)}


def ours(golden: Golden) -> dict[str, Any]:
    del golden
    method = patchcore(backbone="resnet18", image_size=(32, 32), coreset_sampling_ratio=1, num_neighbors=3)
    x = {layer: nhwc(normal(f"official {layer}", 10, *shape)) for layer, shape in SHAPES.items()}
    state, scores = fit_and_score(method, x, 7)
    by_image = np.asarray(state.bank).reshape(64, 7, 12).swapaxes(0, 1)
    return {"bank": by_image, "heat map": scores.pixel, "score": scores.image}
