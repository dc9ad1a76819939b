"""The ops on a mesh of devices against the same ops on one device, and what the devices communicate."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxad.base import Batch
from jaxad.driver.mesh import Layout
from jaxad.methods import METHODS
from jaxad.ops import coreset
from jaxad.ops import knn as knn_module
from jaxad.ops.collect import all_patches, collect_positions, image_first, valid_first
from jaxad.ops.coreset import coreset_centers, greedy_coreset
from jaxad.ops.gaussian import Moments, mahalanobis, moments_init, moments_update
from jaxad.ops.knn import knn, sketch
from jaxad.ops.sharding import shards, take_rows
from tests.examples import slow_after

meshes = pytest.mark.parametrize("shape", slow_after(1, [((2, 4),), ((1, 8),), ((4, 2),), ((8, 1),)]))


def mesh_of(shape):
    """A mesh of the driver: (devices for classes, devices for the data of a class)."""
    return jax.make_mesh(shape, ("class", "data"), axis_types=(AxisType.Auto,) * 2)


def assert_close(results, expected):
    for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        compare = np.testing.assert_array_equal
        if jnp.issubdtype(b.dtype, jnp.floating):
            compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        compare(a, b)


def check(f, shape, make):
    """Compares `f` on a mesh with `f` on one device, for one class and for several as the driver stacks them.

    Args:
        f: A function of arrays, whose rows are sharded where the devices divide them.
        shape: Shape of the mesh.
        make: Draws the arguments of a class with a random generator.
    """
    arguments = [make(np.random.default_rng(i)) for i in range(max(2, shape[0]))]
    expected = [jax.jit(f)(*args) for args in arguments]
    mesh = mesh_of(shape)

    def place(x, *leading):
        rows = "data" if x.shape[len(leading)] % shape[1] == 0 else None
        return jax.device_put(x, NamedSharding(mesh, P(*leading, rows)))

    with jax.set_mesh(mesh):
        assert shards() == shape[1]
        assert_close(jax.jit(f)(*map(place, arguments[0])), expected[0])
        stacked = [place(np.stack(x), "class") for x in zip(*arguments, strict=True)]
        results = jax.jit(Layout(mesh).over_classes(f, (0,) * len(stacked)))(*stacked)
        assert_close(results, jax.tree.map(lambda *x: np.stack(x), *expected))


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


@meshes
@pytest.mark.parametrize(("n", "k"), [(64, 24), (61, 13), (5, 30)])
def test_take_rows(shape, n, k):
    check(take_rows, shape, lambda rng: (normal(rng, n, 5), rng.integers(0, n, k)))


@meshes
@pytest.mark.parametrize(("p", "n", "b"), [(16, 24, 8), (9, 24, 8), (16, 5, 3)])
def test_collect(shape, p, n, b):
    def collect(values, row, valid):
        batch = Batch(None, valid, row, None, row)
        buffer = collect_positions(jnp.zeros((p, n, 5)), values, batch)
        patches, counts = all_patches(buffer, jnp.arange(n) % 3 > 0)
        return image_first(buffer), valid_first(patches, counts, 7)

    def make(rng):
        return normal(rng, b, p, 5), rng.permutation(n)[:b].astype(np.int32), rng.random(b) < 0.8

    check(collect, shape, make)


@meshes
@pytest.mark.parametrize(("n", "k", "share"), [(501, 60, 0.7), (1600, 150, 1.0), (203, 60, 0.2)])
@pytest.mark.parametrize("blocks", slow_after(1, [((32, 8, 50),), ((1024, 256, 8192),)]))
def test_coreset(shape, n, k, share, blocks, monkeypatch):
    """The same centers in the same order, in as many passes; also with fewer valid points than centers."""
    for name, value in zip(("CANDIDATES", "ACCEPTED", "ROWS"), blocks, strict=True):
        monkeypatch.setattr(coreset, name, value)

    def make(rng):
        valid = rng.random(n) < share
        points = np.where(valid[:, None], normal(rng, n, 6), np.nan)
        return points, valid, np.flatnonzero(valid)[[7]].astype(np.int32)

    check(lambda points, valid, first: greedy_coreset(points, k, first[0], valid), shape, make)


@meshes
def test_coreset_centers(shape):
    def make(rng):
        return normal(rng, 501, 6), normal(rng, 6, 3)

    check(lambda points, project: coreset_centers(points, 60, project=project), shape, make)


@meshes
def test_coreset_takes_the_first_of_equally_far_points(shape):
    grid = np.array(list(itertools.product(range(-4, 5), repeat=2)), np.float32)
    check(lambda points: greedy_coreset(points, 30, 40), shape, lambda rng: (grid,))


def neighbors(query, bank, valid, k, bank_sketch=None):
    """Of `knn`, with -1 for neighbors that do not exist."""
    distance, index = knn(query, bank, k, valid, bank_sketch)
    return distance, jnp.where(jnp.isfinite(distance), index, -1)


@meshes
@pytest.mark.parametrize(("m", "k", "share"), [(320, 5, 1.0), (301, 1, 0.5), (50, 30, 0.3), (9, 9, 1.0)])
def test_knn(shape, m, k, share):
    def make(rng):
        valid = rng.random(m) < share
        return normal(rng, 16, 6), np.where(valid[:, None], normal(rng, m, 6), np.nan), valid

    check(functools.partial(neighbors, k=k), shape, make)


@meshes
@pytest.mark.parametrize("m", [96, 401])
def test_knn_orders_ties_by_index(shape, m):
    bank = np.zeros((m, 2), np.float32)
    bank[::3] = 1
    check(lambda bank: knn(jnp.ones((2, 2)), bank, 20), shape, lambda rng: (bank,))


@meshes
@pytest.mark.parametrize(
    ("m", "rank", "k"), slow_after(2, [(2100, 20, 1), (4096, 20, 3), (2176, 20, 1), (2176, 160, 1)])
)
def test_knn_with_a_sketch(shape, m, rank, k):
    """Also with isotropic vectors, for which the first pass proves little."""

    def make(rng):
        vectors = normal(rng, 48 + m, rank) @ normal(rng, rank, 160) / rank**0.5 + 0.1 * normal(rng, 48 + m, 160)
        return vectors[:48], vectors[48:], np.arange(m) < m - 30

    check(lambda query, bank, valid: neighbors(query, bank, valid, k, sketch(bank, valid)), shape, make)


@meshes
@pytest.mark.parametrize("p", [32, 49])
def test_gaussians(shape, p):
    def fit_and_score(x, valid, new):
        _, mean, scatter = moments_update(moments_update(moments_init((p, 5)), x, valid), x + 1, valid)
        factor = jnp.linalg.cholesky(scatter + jnp.eye(5), symmetrize_input=False)
        return mean, factor, mahalanobis(new, mean, factor)

    check(fit_and_score, shape, lambda rng: (normal(rng, 8, p, 5), rng.random(8) < 0.8, normal(rng, 3, p, 5)))


def communication(f, *args):
    """(operation, shape) of every array that devices exchange in the program on a mesh of (1, 8)."""
    with jax.set_mesh(mesh_of((1, 8))):
        text = jax.jit(f).lower(*args).compile().as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    lines = re.findall(rf"= (\(.*?\)|\S+) ({kinds})(?:-start)?\(", text)
    return [
        (kind, tuple(map(int, filter(None, size.split(",")))))
        for types, kind in lines
        for size in re.findall(r"\w\[([\d,]*)\]", types)
    ]


def largest_exchange(f, *args):
    """Elements of the largest array that devices exchange."""
    return max((math.prod(shape) for _, shape in communication(f, *args)), default=0)


def on_mesh(arrays, *spec):
    """Abstract arrays on a mesh of (1, 8)."""
    sharding = NamedSharding(mesh_of((1, 8)), P(*spec))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays)


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def by_rows(state):
    """As the driver places a state: large leaves sharded by their rows, small ones on every device."""
    return jax.tree.map(lambda x: on_mesh(x, *["data"] * (x.size > 4096 and x.shape[0] % 8 == 0)), state)


def test_rows_go_around_in_shards():
    k, d = 2048, 100
    rows, index = by_rows(array(8192, d)), on_mesh(array(k, dtype=jnp.int32))
    assert set(communication(take_rows, rows, index)) == {("collective-permute", (k // 8, d))}


def test_coresets_do_not_move_points():
    points = by_rows(array(1 << 20, 32))
    largest = largest_exchange(lambda points: greedy_coreset(points, 3000), points)
    assert largest <= coreset.CANDIDATES**2 < points.size / 8


@pytest.mark.parametrize("batch", ["data", None])
def test_knn_does_not_move_the_bank(batch):
    n, m, d = 64, 16384, 160
    query, bank, valid = on_mesh(array(n, d), batch), by_rows(array(m, d)), by_rows(array(m, dtype=bool))
    assert largest_exchange(lambda *args: knn(*args[:2], 2, args[2]), query, bank, valid) <= n * d
    bank_sketch = by_rows(jax.eval_shape(sketch, bank, valid))
    assert largest_exchange(lambda *args: knn(*args[:2], 2, *args[2:]), query, bank, valid, bank_sketch) <= n * d


def test_devices_share_the_sketches_of_queries(monkeypatch):
    """All devices compute little more in total than one device computes without a mesh."""
    monkeypatch.setattr(knn_module, "BLOCK_ELEMENTS", 1 << 30)  # one round of loops, which are counted once
    args = array(512, 1600), array(32768, 1600), array(32768, dtype=bool)
    bank_sketch = jax.eval_shape(sketch, *args[1:])

    def flops(*args):
        lowered = jax.jit(lambda *args: knn(*args[:2], 2, *args[2:])).lower(*args)
        return lowered.compile().cost_analysis()["flops"]

    one_device = flops(*args, bank_sketch)
    with jax.set_mesh(mesh_of((1, 8))):
        assert 8 * flops(on_mesh(args[0]), *by_rows((*args[1:], bank_sketch))) < 1.1 * one_device


def test_devices_share_the_sketch_of_a_bank():
    bank, valid = by_rows(array(16384, 160)), by_rows(array(16384, dtype=bool))
    assert largest_exchange(sketch, bank, valid) <= 160 * 160
    with jax.set_mesh(mesh_of((1, 8))):
        sharding = jax.jit(sketch).lower(bank, valid).compile().output_shardings
    assert sharding.rows.spec == sharding.sizes.spec == sharding.norms.spec == P("data")


@pytest.mark.parametrize("batch", ["data", None])
def test_gaussians_do_not_move(batch):
    b, p, d = 8, 256, 40
    x, valid = on_mesh(array(b, p, d), batch), on_mesh(array(b, dtype=bool), batch)
    mean, scatter = by_rows(array(p, d)), by_rows(array(p, d, d))
    moments = Moments(on_mesh(array()), mean, scatter)
    assert largest_exchange(moments_update, moments, x, valid) <= x.size < scatter.size / 2
    assert largest_exchange(functools.partial(jnp.linalg.cholesky, symmetrize_input=False), scatter) == 0
    assert largest_exchange(mahalanobis, x, mean, scatter) <= x.size


@pytest.mark.parametrize("batch", ["data", pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "options"),
    slow_after(
        2,
        [
            ("patchcore", dict(coreset_sampling_ratio=0.25, projection_dim=32, scoring="paper")),
            ("padim", dict(n_features=80)),
            ("patchcore", dict(coreset_sampling_ratio=1.0)),
            ("spade", dict(image_layer="layer2", num_neighbors=5, num_pixel_neighbors=2)),
        ],
    ),
)
def test_no_method_collects_its_state_on_a_device(name, options, batch):
    """In programs of whole methods, devices exchange no more than a batch or the candidates of a coreset."""
    layers = ("layer1", "layer2")
    method = METHODS[name](backbone="pdn_small", layers=layers, image_size=(64, 64), **options)

    def maps(n):
        return {"layer1": array(n, 32, 32, 96), "layer2": array(n, 16, 16, 64)}

    key = on_mesh(jax.eval_shape(lambda: jax.random.key(0)))
    stage, large = method.stages[0], max(8 * 1024 * 160, coreset.CANDIDATES**2)
    state = by_rows(jax.eval_shape(lambda key: stage.init(key, None, (), maps(64)), key))
    x = on_mesh(maps(8), batch)
    data = Batch(x, array(8, dtype=bool), array(8, dtype=jnp.int32), None, array(8, dtype=jnp.int32))
    assert max(leaf.size for leaf in jax.tree.leaves(state)) > 4 * large
    assert largest_exchange(lambda *args: stage.update(args[0], args[1], (), args[2])[0], key, state, data) <= large
    assert largest_exchange(lambda *args: stage.finalize(*args, ()), key, state) <= large
    fitted = by_rows(jax.eval_shape(lambda *args: stage.finalize(*args, ()), key, state))
    assert largest_exchange(lambda state, x: method.score(state, (), x), fitted, x) <= large
