"""PatchCore's coreset of a whole data set: its time, and how near it comes to what the machine can do.

    python experiments/bench_coreset.py --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors

Embeds all training images, projects their patches onto 128 dimensions and selects 10 % of them, as PatchCore does when
it finishes its fit. The matrix products of the passes over all points are counted and compared with what one large
matrix product of the same kind reaches in the same process. About six minutes on two CPU cores, of which the network
takes one and a half. `--smoke` is the small variant that the tests run.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxad
from command import origin, start
from jaxad.files import write_json
from jaxad.base import Batch
from jaxad.data import open_data
from jaxad.detector import peak_bytes
from jaxad.ops.coreset import ACCEPTED, greedy_coreset
from jaxad.ops.knn import squared_distances


@dataclass
class Options:
    """Measure the coreset of a whole data set."""

    data: str = "demo"
    weights: Path | None = None
    category: str | None = None
    ratio: float = 0.1
    projection_dim: int = 128
    results: Path = field(default_factory=lambda: Path(__file__).parent / "results")
    smoke: bool = False
    """Few small images."""


def projected_patches(options: Options) -> tuple[np.ndarray, float]:
    """The projected patches of all training images, and the seconds that took; the whole features are not kept."""
    detector = jaxad.Detector("patchcore", weights=options.weights, image_size=64 if options.smoke else 224)
    opened = open_data(options.data, category=options.category, preprocess=detector.preprocess)
    train = next(iter(opened.values())).train
    train = train.subset(slice(None, 6)) if options.smoke else train
    method, frozen, size = detector.method, detector.load_frozen(), 1 if options.smoke else 16

    @jax.jit
    def patches(image: jax.Array, key: jax.Array) -> jax.Array:
        spec = jax.eval_shape(method.embed, frozen, image)
        batch = Batch(
            method.embed(frozen, image),
            jnp.ones(image.shape[0], bool),
            jnp.zeros(image.shape[0], jnp.int32),
            None,
            jnp.arange(image.shape[0], dtype=jnp.int32),
        )
        found, _ = method.stages[0].update(key, method.init(key, frozen, spec), frozen, batch)
        found = found.patches.swapaxes(0, 1).reshape(-1, found.patches.shape[-1])
        projection = jax.random.normal(key, (found.shape[1], options.projection_dim)) / options.projection_dim**0.5
        return jnp.matmul(found, projection, precision=jax.lax.Precision.HIGHEST)

    started, parts = time.perf_counter(), []
    for i in range(0, len(train), size):
        index = np.arange(i, min(i + size, len(train)))
        found = np.asarray(patches(jnp.asarray(train.images(np.resize(index, size))), jax.random.key(0)))
        parts.append(found.reshape(size, -1, found.shape[-1])[: len(index)].reshape(-1, found.shape[-1]))
        print(f"\rembed {index[-1] + 1}/{len(train)} images", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return np.concatenate(parts), time.perf_counter() - started


def main(options: Options) -> None:
    """Measures and writes results/bench_coreset.json."""
    points, embed_seconds = projected_patches(options)
    n, d = points.shape
    k = max(1, round(options.ratio * n))
    placed = jnp.asarray(points)
    started = time.perf_counter()
    select = jax.jit(greedy_coreset, static_argnums=1).lower(placed, k).compile()
    compiled = time.perf_counter() - started
    started = time.perf_counter()
    coreset = jax.block_until_ready(select(placed))
    seconds = time.perf_counter() - started
    product = jax.jit(squared_distances)
    rows = min(n, 8192)
    jax.block_until_ready(product(placed[:rows], placed[:ACCEPTED]))
    rates = []
    for _ in range(20):
        started = time.perf_counter()
        jax.block_until_ready(product(placed[:rows], placed[:ACCEPTED]))
        rates.append(2 * rows * min(n, ACCEPTED) * d / (time.perf_counter() - started))
    flops = 2 * n * d * min(n, ACCEPTED) * (int(coreset.passes) - 1)
    moved = n * (d + 2) * 4 * (int(coreset.passes) - 1)
    record = {
        "recipe": "bench_coreset",
        "dataset": options.data if options.data == "demo" else Path(options.data).name,
        "patches": n,
        "dimensions": d,
        "coreset": k,
        "passes": int(coreset.passes),
        "radius": float(coreset.radius),
        "seconds": {"embed": embed_seconds, "compile": compiled, "select": seconds},
        "flops_per_second": flops / seconds,
        "share_of_one_product": flops / seconds / float(np.median(rates)),
        "product_flops_per_second": rates,
        "bytes_per_second": moved / seconds,
        "peak_bytes": peak_bytes(),
        **origin(),
        "notes": "flops and bytes are those of the passes over all points; a product is one block of a pass.",
    }
    write_json(options.results / "bench_coreset.json", record)


if __name__ == "__main__":
    start(main, Options)
