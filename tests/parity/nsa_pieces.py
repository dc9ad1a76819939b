"""NSA's training images against patch_ex of hmsch/natural-synthetic-anomalies, which clones with OpenCV.

Commit 9195916. Two pieces of the source are cloned into the target: with a background that is skipped, and with
mixed gradients. `numpy.random` there, and `jax.random` here, give the draws of the file. A piece with an odd number of
columns is moved to the left by a pixel before OpenCV clones it. Compared are the sums of the changes and of the labels
over columns and over rows, in levels of 255.
"""

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxad.synthesis.nsa import TRIES, Sizes, natural_anomaly
from tests.parity.golden import Golden
from tests.parity.steps import KEY

WHY = "OpenCV interpolates with 11 bits, so that single pixels differ by a level"
TOLERANCES = {"image": (2e-2, WHY), "labels": (5e-2, WHY)}
LABELS = {"normal": "logistic", "mixed": "intensity"}


def ours(golden: Golden) -> dict[str, Any]:
    given = golden.given
    target, source = (jnp.asarray(given[name], jnp.float32) / 255 for name in ("target", "source"))
    objects = tuple(jnp.asarray(mask, bool) for mask in given["objects"])

    def draw(kind: str) -> tuple[jax.Array, jax.Array]:
        sides, factors = (iter(given[f"{kind} {part}"]) for part in ("sides", "factors"))
        pairs = zip(given[f"{kind} centers"], given[f"{kind} places"], strict=True)
        shares = (np.resize(share, (TRIES, 2)) for pair in pairs for share in pair)
        draws = {
            "gamma": lambda *_: jnp.asarray(next(sides)),
            "normal": lambda *_: jnp.asarray(next(factors)),
            "uniform": lambda *_: jnp.asarray(next(shares)),
            "bernoulli": lambda *_: jnp.asarray(True),
        }
        with mock.patch.multiple(jax.random, **draws):
            image, label = natural_anomaly(
                KEY,
                target,
                source,
                foregrounds=objects if kind == "normal" else None,
                pieces=2,
                sizes=Sizes(0.03, 0.3),
                least_object=0.7,
                mixed=kind == "mixed",
                labels=LABELS[kind],
                logistic=(1 / 12, 24.0),
            )
        return 255 * (image - target), label

    drawn = jax.jit(lambda: {kind: draw(kind) for kind in LABELS})()
    results = {}
    for kind, (change, label) in drawn.items():
        quantities = {"image": np.asarray(change).sum(-1), "labels": np.asarray(label)}
        for name, x in quantities.items():
            results |= {f"{name}/{kind} rows": x.sum(1), f"{name}/{kind} columns": x.sum(0)}
    return results
