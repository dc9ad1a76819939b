"""Speed beside peers, in one run on one machine: coreset, nearest neighbors, and a whole fit.

    python -m experiments.bench.peers --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors

Contenders take turns (A B A B ...), so that a drift of the machine's speed affects all of them alike; compile time is
reported apart. The peers are a plain jitted greedy loop, FAISS's flat index and scikit-learn (`pip install
jaxad[peers]`). The bare matrix product of the nearest-neighbor search is measured too: no brute force is faster. Takes
about five minutes on two CPU cores. `--smoke` is the small variant for the tests.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import jax
import jax.numpy as jnp
import numpy as np
import sklearn
import sklearn.neighbors

import jaxad
from experiments.command import RESULTS, origin, start
from jaxad.data import open_data
from jaxad.driver.memory import peak_bytes
from jaxad.files import write_json
from jaxad.ops.coreset import greedy_coreset
from jaxad.ops.knn import knn, sketch


@dataclass
class Options:
    """Measure jaxad beside its peers."""

    data: str = "demo"
    weights: Path | None = None
    backbone: str = "pdn_small"
    category: str | None = None
    results: Path = RESULTS
    runs: int = 7
    images: int = 100
    smoke: bool = False
    """Few images and runs."""


def take_turns(contenders: dict[str, Callable[[], Any]], runs: int) -> dict[str, dict[str, Any]]:
    """Seconds of every run of every contender, in turns, after a first run that compiles and does not count."""
    first: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(runs + 1):
        for name, call in contenders.items():
            started = time.perf_counter()
            jax.block_until_ready(call())
            elapsed = time.perf_counter() - started
            if turn:
                seconds[name].append(elapsed)
            else:
                first[name] = elapsed
    return {n: {"first_run": first[n], "runs": s, "median": float(np.median(s))} for n, s in seconds.items()}


def plain_greedy(points: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The textbook loop, a pass over all points for every center; indices of the centers and the covering radius."""

    def body(i: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        nearest, order = carry
        center = jnp.argmax(nearest)
        distance = jnp.sum((points - points[center]) ** 2, 1)
        return jnp.minimum(nearest, distance), order.at[i].set(center)

    start = jnp.sum((points - points[0]) ** 2, 1), jnp.zeros(k, jnp.int32)
    nearest, order = jax.lax.fori_loop(1, k, body, start)
    return order, jnp.sqrt(nearest.max())


def coreset(patches: np.ndarray, runs: int) -> dict[str, Any]:
    """Selects 10 % of all patches (n c) in a random projection onto 128 dimensions."""
    projection = np.random.default_rng(0).normal(size=(patches.shape[1], 128)).astype(np.float32) / np.sqrt(128)
    points = jnp.asarray(patches @ projection)
    k = points.shape[0] // 10
    ours, plain = jax.jit(lambda p: greedy_coreset(p, k)), jax.jit(lambda p: plain_greedy(p, k))
    timed = take_turns({"jaxad": lambda: ours(points), "plain jitted greedy": lambda: plain(points)}, runs)
    selected, (order, radius) = ours(points), plain(points)
    return {
        "shape": points.shape,
        "centers": k,
        "contenders": timed,
        "ratio": timed["plain jitted greedy"]["median"] / timed["jaxad"]["median"],
        "radius": {"jaxad": float(selected.radius), "plain jitted greedy": float(radius)},
        "same_centers": float(np.isin(np.asarray(selected.index), np.asarray(order)).mean()),
        "passes": int(selected.passes),
    }


def neighbors(query: np.ndarray, bank: np.ndarray, runs: int, k: int = 9) -> dict[str, Any]:
    """Finds the k nearest of a bank (n c) for the patches of one image (m c)."""
    q, b = jnp.asarray(query), jnp.asarray(bank)
    prepare, valid = jax.jit(sketch), jnp.ones(bank.shape[0], bool)
    jax.block_until_ready(prepare(b, valid))
    started = time.perf_counter()
    prepared = jax.block_until_ready(prepare(b, valid))
    seconds_to_prepare = time.perf_counter() - started
    ours = jax.jit(lambda q, b, prepared: knn(q, b, k, sketch=prepared))
    brute_force = jax.jit(lambda q, b: knn(q, b, k))
    index = faiss.IndexFlatL2(bank.shape[1])
    index.add(bank)
    scikit = sklearn.neighbors.NearestNeighbors(n_neighbors=k, algorithm="brute").fit(bank)
    product = jax.jit(lambda q, b: q @ b.T)
    contenders = {
        "jaxad": lambda: ours(q, b, prepared),
        "jaxad, one pass": lambda: brute_force(q, b),
        "bare matrix product": lambda: product(q, b),
        "FAISS flat": lambda: index.search(query, k),
        "scikit-learn": lambda: scikit.kneighbors(query),
    }
    timed = take_turns(contenders, runs)
    indices, expected = np.asarray(ours(q, b, prepared)[1]), index.search(query, k)[1]
    exact = ((query[:, None].astype(np.float64) - bank[indices].astype(np.float64)) ** 2).sum(-1)
    theirs = ((query[:, None].astype(np.float64) - bank[expected].astype(np.float64)) ** 2).sum(-1)
    return {
        "shape": [*query.shape, *bank.shape, k],
        "seconds_to_prepare": seconds_to_prepare,
        "contenders": timed,
        "ratio": timed["FAISS flat"]["median"] / timed["jaxad"]["median"],
        "over_bare_matrix_product": timed["jaxad"]["median"] / timed["bare matrix product"]["median"],
        "ratio_scikit_learn": timed["scikit-learn"]["median"] / timed["jaxad"]["median"],
        "same_neighbors": float(np.mean([len(set(a) & set(c)) == k for a, c in zip(indices, expected, strict=True)])),
        "largest_relative_difference_of_distances": float(np.max(np.abs(exact - theirs) / np.maximum(theirs, 1e-9))),
    }


def main(options: Options) -> None:
    """Measures all three and writes results/bench_peers.json."""
    runs, images = (1, 8) if options.smoke else (options.runs, options.images)
    size = 64 if options.smoke else 224
    shared: dict[str, Any] = dict(backbone=options.backbone, weights=options.weights, image_size=size, holdout=0)
    detector = jaxad.Detector("patchcore", coreset_sampling_ratio=0.1, **shared)
    split = next(
        iter(open_data(options.data, category=options.category, preprocess=detector.settings.preprocess).values())
    )
    train, test = split.train.subset(slice(0, images)), split.train.subset(slice(images, images + 32))
    test = test if len(test) else train

    whole: dict[str, Any] = {"images": len(train), "fit": [], "compile": [], "score_per_image": []}
    for _ in range(min(runs, 3)):
        detector.fit(train)
        started = time.perf_counter()
        list(detector.score(test))
        whole["score_per_image"].append((time.perf_counter() - started) / len(test))
        assert detector.model is not None
        for phase in ("fit", "compile"):
            whole[phase].append(detector.model.seconds[phase])
    whole["median"] = {k: float(np.median(whole[k])) for k in ("fit", "score_per_image")}

    complete = jaxad.Detector("patchcore", coreset_sampling_ratio=1.0, **shared)
    patches = np.asarray(complete.fit(train).state.bank)
    bank = np.asarray(detector.state.bank)[:-1]
    query = np.asarray(complete.fit(test.subset([0])).state.bank)
    record = {
        "recipe": "bench_peers",
        "backbone": detector.settings.backbone[0],
        "data": Path(options.data).name,
        "coreset": coreset(patches, runs),
        "knn": neighbors(query, bank, runs),
        "whole_fit": whole,
        "peak_bytes": peak_bytes(),
        **origin(),
        "versions": {"jax": jax.__version__, "faiss": faiss.__version__, "scikit-learn": sklearn.__version__},
    }
    write_json(options.results / "bench_peers.json", record)
    for part in ("coreset", "knn"):
        medians = {name: round(c["median"], 4) for name, c in record[part]["contenders"].items()}
        print(f"{part}: {medians} seconds, ratio {record[part]['ratio']:.2f}")
    medians = whole["median"]
    print(f"fit of {len(train)} images: {medians['fit']:.1f} s; scoring: {medians['score_per_image']:.3f} s an image")


if __name__ == "__main__":
    start(main, Options)
