"""Mahalanobis AD against the code of its authors with scikit-learn's LedoitWolf and PCA, on features of two levels.

Their Mahalanobis ran with a network that gives these features: compute_train_statistics (PCA, NPCA, covariance) and
test_step. Its score is the mean over the levels, jaxad's the sum. Precisions are compared in the space of the features,
because principal directions have no sign.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxad.methods.mahalanobis_ad import mahalanobis_ad
from tests.parity.golden import Golden
from tests.parity.steps import KEY, batch_of

CASES = {"few": (8, None), "few pca": (8, "pca"), "npca": (40, "npca")}
"""Name -> images and reduction; the levels have 6 and 10 features."""


def ours(golden: Golden) -> dict[str, Any]:
    layers, quantities = ("layer1", "layer2"), {}
    for name, (n, reduction) in CASES.items():
        method = mahalanobis_ad(backbone="resnet18", layers=layers, reduction=reduction, variance_threshold=0.9)
        stage = method.stages[0]
        train = {layer: jnp.asarray(golden.given[f"train {i}"][:n]) for i, layer in enumerate(layers)}
        test = {layer: jnp.asarray(golden.given[f"test {i}"]) for i, layer in enumerate(layers)}

        @jax.jit
        def run(train: Any, test: Any, stage: Any = stage, method: Any = method) -> Any:
            state, _ = stage.update(KEY, stage.init(KEY, None, None, train), None, batch_of(train))
            state = stage.finalize(KEY, state, None)
            return state, method.score(state, None, test)

        state, scores = run(train, test)
        quantities[f"score/{name}"] = scores.image / len(layers)
        for i, layer in enumerate(layers):
            factor = np.asarray(state[layer].factor, np.float64)
            precision = np.linalg.inv(factor @ factor.T)
            if reduction is None:
                quantities[f"mean/{name} {i}"] = state[layer].mean
            else:
                precision = state[layer].basis @ precision @ state[layer].basis.T
            quantities[f"inverse covariance/{name} {i}"] = precision
    return quantities
