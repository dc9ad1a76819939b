"""The ops on a mesh of devices against the same on one device, and what the devices tell each other."""

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
from jaxad.ops.coreset import greedy_coreset
from jaxad.ops.gaussian import Moments, mahalanobis, moments_init, moments_update
from jaxad.ops.knn import knn, sketch
from jaxad.ops.sharding import shards, take_rows

meshes = pytest.mark.parametrize("shape", [(1, 8), (2, 4), (4, 2), (8, 1)])


def mesh_of(shape):
    """The meshes of the driver: classes beside each other, and the data of each on several devices."""
    return jax.make_mesh(shape, ("class", "data"), axis_types=(AxisType.Auto,) * 2)


def agree(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        compare = np.testing.assert_array_equal
        if jnp.issubdtype(b.dtype, jnp.floating):
            compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        compare(a, b)


def check(f, shape, make):
    """`f` of one class, and of several as the driver has them, with all rows on their devices where these divide them.

    Args:
        f: A function of arrays.
        shape: That of the mesh.
        make: The arguments of a class, from a random generator.
    """
    classes = max(2, shape[0])
    each = [make(np.random.default_rng(i)) for i in range(classes)]
    wanted = [jax.jit(f)(*args) for args in each]
    mesh = mesh_of(shape)

    def place(x, *leading):
        rows = "data" if x.shape[len(leading)] % shape[1] == 0 else None
        return jax.device_put(x, NamedSharding(mesh, P(*leading, rows)))

    with jax.set_mesh(mesh):
        assert shards() == shape[1]
        agree(jax.jit(f)(*map(place, each[0])), wanted[0])
        stacked = [place(np.stack(x), "class") for x in zip(*each, strict=True)]
        found = jax.jit(Layout(mesh, True).over_classes(f, (0,) * len(stacked)))(*stacked)
        agree(found, jax.tree.map(lambda *x: np.stack(x), *wanted))


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


@meshes
@pytest.mark.parametrize(("n", "k"), [(64, 24), (61, 13), (5, 30)])
def test_take_rows(shape, n, k):
    check(take_rows, shape, lambda rng: (normal(rng, n, 5), rng.integers(0, n, k)))


@meshes
@pytest.mark.parametrize(("n", "k", "share"), [(1600, 150, 1.0), (501, 60, 0.7), (203, 60, 0.2)])
@pytest.mark.parametrize("blocks", [(1024, 256, 8192), (32, 8, 50)])
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
def test_coreset_takes_the_lowest_of_equally_far(shape):
    grid = np.array(list(itertools.product(range(-4, 5), repeat=2)), np.float32)
    check(lambda points: greedy_coreset(points, 30, 40), shape, lambda rng: (grid,))


def found(query, bank, valid, k, made=None):
    distance, index = knn(query, bank, k, valid, made)
    return distance, jnp.where(jnp.isfinite(distance), index, -1)


@meshes
@pytest.mark.parametrize(("m", "k", "share"), [(320, 5, 1.0), (301, 1, 0.5), (50, 30, 0.3), (9, 9, 1.0)])
def test_knn(shape, m, k, share):
    def make(rng):
        valid = rng.random(m) < share
        return normal(rng, 16, 6), np.where(valid[:, None], normal(rng, m, 6), np.nan), valid

    check(functools.partial(found, k=k), shape, make)


@meshes
@pytest.mark.parametrize("m", [96, 401])
def test_knn_orders_ties_by_index(shape, m):
    bank = np.zeros((m, 2), np.float32)
    bank[::3] = 1
    check(lambda bank: knn(jnp.ones((2, 2)), bank, 20), shape, lambda rng: (bank,))


@meshes
@pytest.mark.parametrize(("m", "rank", "k"), [(2176, 20, 1), (2100, 20, 1), (2176, 160, 1), (4096, 20, 3)])
def test_knn_with_a_sketch(shape, m, rank, k):
    """Also where few directions do not hold most of the variance, so that the first pass proves little."""

    def make(rng):
        vectors = normal(rng, 48 + m, rank) @ normal(rng, rank, 160) / rank**0.5 + 0.1 * normal(rng, 48 + m, 160)
        return vectors[:48], vectors[48:], np.arange(m) < m - 30

    check(lambda query, bank, valid: found(query, bank, valid, k, sketch(bank, valid)), shape, make)


@meshes
@pytest.mark.parametrize("p", [32, 49])
def test_gaussians(shape, p):
    def fit_and_score(x, valid, new):
        _, mean, scatter = moments_update(moments_update(moments_init((p, 5)), x, valid), x + 1, valid)
        factor = jnp.linalg.cholesky(scatter + jnp.eye(5), symmetrize_input=False)
        return mean, factor, mahalanobis(new, mean, factor)

    check(fit_and_score, shape, lambda rng: (normal(rng, 8, p, 5), rng.random(8) < 0.8, normal(rng, 3, p, 5)))


def told(f, *args):
    """(what, shape) of all that the devices tell each other in the program on a mesh of (1, 8)."""
    with jax.set_mesh(mesh_of((1, 8))):
        text = jax.jit(f).lower(*args).compile().as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    lines = re.findall(rf"= (\(.*?\)|\S+) ({kinds})(?:-start)?\(", text)
    return [
        (kind, tuple(map(int, filter(None, size.split(",")))))
        for types, kind in lines
        for size in re.findall(r"\w\[([\d,]*)\]", types)
    ]


def most(f, *args):
    return max((math.prod(shape) for _, shape in told(f, *args)), default=0)


def on_mesh(tree, *spec):
    """Shapes on a mesh of (1, 8)."""
    sharding = NamedSharding(mesh_of((1, 8)), P(*spec))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def by_rows(tree):
    """As the driver places a state: large leaves by their rows, small ones on every device."""
    return jax.tree.map(lambda x: on_mesh(x, *["data"] * (x.size > 4096 and x.shape[0] % 8 == 0)), tree)


def test_rows_go_round_in_shares():
    k, d = 2048, 100
    rows, index = by_rows(array(8192, d)), on_mesh(array(k, dtype=jnp.int32))
    assert set(told(take_rows, rows, index)) == {("collective-permute", (k // 8, d))}


def test_the_points_of_a_coreset_stay_where_they_are():
    points = by_rows(array(1 << 20, 32))
    assert most(lambda points: greedy_coreset(points, 3000), points) <= coreset.CANDIDATES**2 < points.size / 8


@pytest.mark.parametrize("batch", ["data", None])
def test_a_bank_stays_where_it_is(batch):
    n, m, d = 64, 16384, 160
    query, bank, valid = on_mesh(array(n, d), batch), by_rows(array(m, d)), by_rows(array(m, dtype=bool))
    assert most(lambda *args: knn(*args[:2], 2, args[2]), query, bank, valid) <= n * d
    made = by_rows(jax.eval_shape(sketch, bank, valid))
    assert most(lambda *args: knn(*args[:2], 2, *args[2:]), query, bank, valid, made) <= n * d


def test_the_sketches_of_queries_are_made_by_rows(monkeypatch):
    """All devices together compute little more than one alone."""
    monkeypatch.setattr(knn_module, "BLOCK_ELEMENTS", 1 << 30)  # a loop has one round, which is counted once
    args = array(512, 1600), array(32768, 1600), array(32768, dtype=bool)
    made = jax.eval_shape(sketch, *args[1:])

    def flops(*args):
        lowered = jax.jit(lambda *args: knn(*args[:2], 2, *args[2:])).lower(*args)
        return lowered.compile().cost_analysis()["flops"]

    alone = flops(*args, made)
    with jax.set_mesh(mesh_of((1, 8))):
        assert 8 * flops(on_mesh(args[0]), *by_rows((*args[1:], made))) < 1.1 * alone


def test_a_sketch_is_made_by_rows():
    bank, valid = by_rows(array(16384, 160)), by_rows(array(16384, dtype=bool))
    assert most(sketch, bank, valid) <= 160 * 160
    with jax.set_mesh(mesh_of((1, 8))):
        made = jax.jit(sketch).lower(bank, valid).compile().output_shardings
    assert made.rows.spec == made.sizes.spec == made.norms.spec == P("data")


@pytest.mark.parametrize("batch", ["data", None])
def test_gaussians_stay_where_they_are(batch):
    b, p, d = 8, 256, 40
    x, valid = on_mesh(array(b, p, d), batch), on_mesh(array(b, dtype=bool), batch)
    mean, scatter = by_rows(array(p, d)), by_rows(array(p, d, d))
    assert most(moments_update, Moments(on_mesh(array()), mean, scatter), x, valid) <= x.size < scatter.size / 2
    assert most(functools.partial(jnp.linalg.cholesky, symmetrize_input=False), scatter) == 0
    assert most(mahalanobis, x, mean, scatter) <= x.size


@pytest.mark.parametrize("batch", ["data", None])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("patchcore", dict(coreset_sampling_ratio=0.25, projection_dim=32, scoring="paper")),
        ("patchcore", dict(coreset_sampling_ratio=1.0)),
        ("padim", dict(n_features=80)),
        ("spade", dict(image_layer="layer2", num_neighbors=5, num_pixel_neighbors=2)),
    ],
)
def test_no_method_collects_its_state_on_a_device(name, options, batch):
    """Programs of whole methods: what the devices tell each other is no larger than a batch or the candidates."""
    layers = ("layer1", "layer2")
    method = METHODS[name](backbone="pdn_small", layers=layers, image_size=(64, 64), **options)

    def maps(n):
        return {"layer1": array(n, 32, 32, 96), "layer2": array(n, 16, 16, 64)}

    key = on_mesh(jax.eval_shape(lambda: jax.random.key(0)))
    state = by_rows(jax.eval_shape(lambda key: method.init(key, (), maps(64)), key))
    x = on_mesh(maps(8), batch)
    data = Batch(x, array(8, dtype=bool), array(8, dtype=jnp.int32), None, array(8, dtype=jnp.int32))
    stage, large = method.stages[0], max(8 * 1024 * 160, coreset.CANDIDATES**2)
    assert max(leaf.size for leaf in jax.tree.leaves(state)) > 4 * large
    assert most(lambda *args: stage.update(args[0], args[1], (), args[2])[0], key, state, data) <= large
    assert most(lambda *args: stage.finalize(*args, ()), key, state) <= large
    fitted = by_rows(jax.eval_shape(lambda *args: stage.finalize(*args, ()), key, state))
    assert most(lambda state, x: method.score(state, (), x), fitted, x) <= large
