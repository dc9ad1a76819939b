"""PatchCore's coreset of a whole data set: its time, and how close that is to what the machine can do.

    python -m experiments.bench.coreset --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors

Embeds all training images, projects their patches onto 128 dimensions and selects 10 % of them, as PatchCore does at
the end of its fit. The floating point operations of the passes over all points are compared with the rate that one
large matrix product of the same kind reaches in the same process. Takes about six minutes on two CPU cores, one and a
half of which the network takes. `--smoke` is the small variant for the tests.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxad
from experiments.command import RESULTS, origin, start
from experiments.opening import batch_of
from jaxad.data import open_data
from jaxad.driver.memory import peak_bytes
from jaxad.files import write_json
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
    results: Path = RESULTS
    smoke: bool = False
    """Few small images."""


def projected_patches(options: Options) -> tuple[np.ndarray, float]:
    """The projected patches of all training images (n 128), and the seconds of embedding and projecting them."""
    detector = jaxad.Detector("patchcore", weights=options.weights, image_size=64 if options.smoke else 224)
    splits = open_data(options.data, category=options.category, preprocess=detector.settings.preprocess)
    train = next(iter(splits.values())).train
    train = train.subset(slice(None, 6)) if options.smoke else train
    frozen, batch_size = detector.load_frozen(), 1 if options.smoke else 16
    embed, stage = detector.method.embed, detector.method.stages[0]

    @jax.jit
    def patches(image: jax.Array, key: jax.Array) -> jax.Array:
        empty = stage.init(key, None, frozen, jax.eval_shape(embed, frozen, image))
        state, _ = stage.update(key, empty, frozen, batch_of(embed(frozen, image)))
        features = state.patches.swapaxes(0, 1).reshape(-1, state.patches.shape[-1])
        projection = jax.random.normal(key, (features.shape[1], options.projection_dim)) / options.projection_dim**0.5
        return jnp.matmul(features, projection, precision=jax.lax.Precision.HIGHEST)

    started, parts = time.perf_counter(), []
    for i in range(0, len(train), batch_size):
        index = np.arange(i, min(i + batch_size, len(train)))
        images = jnp.asarray(train.images(np.resize(index, batch_size)))
        points = np.asarray(patches(images, jax.random.key(0)))
        parts.append(points.reshape(batch_size, -1, points.shape[-1])[: len(index)].reshape(-1, points.shape[-1]))
        print(f"\rembed {index[-1] + 1}/{len(train)} images", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return np.concatenate(parts), time.perf_counter() - started


def main(options: Options) -> None:
    """Measures and writes results/bench_coreset.json."""
    points, embed_seconds = projected_patches(options)
    n, d = points.shape
    k = max(1, round(options.ratio * n))
    on_device = jnp.asarray(points)
    started = time.perf_counter()
    select = jax.jit(greedy_coreset, static_argnums=1).lower(on_device, k).compile()
    compiled = time.perf_counter() - started
    started = time.perf_counter()
    coreset = jax.block_until_ready(select(on_device))
    seconds = time.perf_counter() - started
    product = jax.jit(squared_distances)
    rows = min(n, 8192)
    jax.block_until_ready(product(on_device[:rows], on_device[:ACCEPTED]))
    rates = []
    for _ in range(20):
        started = time.perf_counter()
        jax.block_until_ready(product(on_device[:rows], on_device[:ACCEPTED]))
        rates.append(2 * rows * min(n, ACCEPTED) * d / (time.perf_counter() - started))
    flops = 2 * n * d * min(n, ACCEPTED) * (int(coreset.passes) - 1)
    bytes_read = n * (d + 2) * 4 * (int(coreset.passes) - 1)
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
        "bytes_per_second": bytes_read / seconds,
        "peak_bytes": peak_bytes(),
        **origin(),
        "notes": "Operations and bytes are those of the passes over all points. A product is one block of a pass.",
    }
    write_json(options.results / "bench_coreset.json", record)


if __name__ == "__main__":
    start(main, Options)
