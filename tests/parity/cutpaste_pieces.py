"""CutPaste's pieces against CutPasteNormal and CutPasteScar of cutpaste.py in Runinho/pytorch-cutpaste.

Commit 10d8bf7. Both generators are called on an image of 256 px without color jitter; `random.uniform` and
`Tensor.uniform_` give the drawn shares of the file, and `jax.random.uniform` gives the same here; a place is drawn from
all where the piece fits: the reference leaves out the last row and column, and takes the width of a scar for its height
and the height for its width there. Compared are the sums of the changes over columns and over rows.
"""

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from jaxad.synthesis.cutpaste import cutpaste, scar
from tests.parity.golden import Golden, pixels
from tests.parity.steps import KEY

SPLIT = (2, 3, 5)
"""Of the draws: size, rotation, the place from which, the place to which."""


def ours(golden: Golden) -> dict[str, Any]:
    image = jnp.asarray(pixels("image", 256, 256, 3), jnp.float32) / 255

    def change(draws: jax.Array) -> list[jax.Array]:
        size, turn, *places = jnp.split(draws, SPLIT)
        results = []
        for generator in (cutpaste, scar):
            shares = iter((size, turn[0], *places))

            def uniform(key: Any, shape: Any = (), dtype: Any = None, minval: float = 0.0, maxval: float = 1.0) -> Any:
                del key, shape, dtype
                return minval + (maxval - minval) * next(shares)  # noqa: B023

            with mock.patch.object(jax.random, "uniform", uniform):
                results.append(generator(KEY, image, jitter=0.0)[0] - image)
        return [total for x in results for total in (x.sum((1, 2)), x.sum((0, 2)))]

    sums = jax.jit(jax.vmap(change))(golden.given["draws"])
    names = [f"{piece}/{axis}" for piece in ("rectangle", "scar") for axis in ("rows", "columns")]
    return {f"{name} {i}": total for name, totals in zip(names, sums, strict=True) for i, total in enumerate(totals)}
