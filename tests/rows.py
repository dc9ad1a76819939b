"""One fit a row of the conformance table, which serves all tests of that row.

Everything runs through the driver's programs, so that a row is compiled twice at most: for one class and, where a test
asks for it, for several.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxad.base import Frozen, Method, PyTree, Scores, State
from jaxad.data import Dataset, Preprocess, open_data
from jaxad.driver.execution import Execution
from jaxad.driver.fit import fit
from jaxad.driver.mesh import Layout
from jaxad.driver.plan import Plan, estimate
from jaxad.driver.program import compile_count
from jaxad.driver.programs import abstract_state, embedded_spec, score_program
from jaxad.driver.scoring import score_all
from tests.cases import CASES, IMAGE_SIZE

B = 4
"""Images a batch."""
N = 12
"""Training images: full batches."""
KEY = jax.random.key(5)
EXECUTION = Execution(batch_size=B)


def photographs(seed: int, n: int) -> np.ndarray:
    """Gratings with noise, of one kind a seed."""
    rng = np.random.default_rng(seed)
    y, x = np.indices(IMAGE_SIZE)
    clean = 128 + 60 * np.sin((x * (seed + 1) + y) / 3)[..., None] * np.array([1.0, 0.8, 0.6])
    return np.clip(clean + rng.normal(0, 12, (n, *IMAGE_SIZE, 3)), 0, 255).astype(np.uint8)


def defective(images: np.ndarray) -> np.ndarray:
    """The images with a bright square on each."""
    images = images.copy()
    images[:, 20:36, 24:40] = 255
    return images


@functools.cache
def datasets(seed: int, n: int) -> tuple[Dataset, Dataset]:
    """Training images of a class, and four test images: two normal ones, and the same with a defect."""
    images = photographs(seed, n + 2)
    test = np.concatenate([images[n:], defective(images[n:])])
    opened = open_data({f"class{seed}": images[:n], "test": test}, preprocess=Preprocess(None))
    return opened[f"class{seed}"].train, opened["test"].train


@functools.cache
def frozen_of(backbones: tuple, seed: int) -> Frozen:
    """Random weights of the backbones."""
    weights = tuple(network.init(jax.random.key(seed + i)) for i, network in enumerate(backbones))
    return weights if len(weights) > 1 else weights[0]


@functools.cache
def method_for(name: str, longer: bool = False) -> Method:
    """The method of a row."""
    return CASES[name].make(longer)


def frozen_for(name: str, seed: int = 0) -> Frozen:
    """The weights of a row; None where its method has none."""
    return frozen_of(CASES[name].backbones, seed) if method_for(name).pretrained else None


def auxiliary_for(method: Method) -> np.ndarray | None:
    """The photographs that a method learns from, too."""
    return photographs(8, 3) if method.auxiliary else None


class Row(NamedTuple):
    """A fitted row."""

    method: Method
    frozen: Frozen
    state: State
    plan: Plan
    programs: int
    """Compiled for estimating, fitting and scoring."""
    programs_after_estimate: int
    """Those of them that the estimate had not compiled."""
    scores: Scores
    """Of the test images."""
    test: PyTree
    """The test images, embedded."""

    def fit(self, key: jax.Array = KEY, frozen: Frozen = None) -> State:
        """Another fit in the same programs."""
        frozen = self.frozen if frozen is None else frozen
        data, auxiliary = datasets(0, N)[0], auxiliary_for(self.method)
        return fit(self.method, frozen, data, key, EXECUTION, auxiliary=auxiliary).state

    def score(self, x: PyTree, state: State = None, frozen: Frozen = None) -> Scores:
        """The scores of four embedded images, by the program that scores."""
        program = score_program(self.method, Layout(), None, False)
        state, frozen = (self.state if state is None else state), (self.frozen if frozen is None else frozen)
        scores = program(state, frozen, jax.tree.map(lambda leaf: leaf[None, None], x))
        return jax.tree.map(lambda leaf: leaf[0], scores)


@functools.lru_cache(maxsize=4)
def row(name: str, longer: bool = False) -> Row:
    """A row of the table, estimated, fitted and scored."""
    method, frozen = method_for(name, longer), frozen_for(name)
    train, test = datasets(0, N)
    auxiliary, before = auxiliary_for(method), compile_count()
    plan = estimate(method, frozen, [train], EXECUTION, auxiliary=auxiliary)
    estimated = compile_count()
    state = fit(method, frozen, train, KEY, EXECUTION, auxiliary=auxiliary).state
    scores = score_all(method, state, frozen, test, EXECUTION)
    programs = compile_count()
    x = jax.jit(method.embed)(frozen, test.images(range(len(test))))
    return Row(method, frozen, state, plan, programs - before, programs - estimated, scores, x)


def spec(method: Method, frozen: Frozen, n: int) -> PyTree:
    """Shapes and types of n embedded images."""
    return embedded_spec(method.embed, frozen, n, IMAGE_SIZE)


@functools.lru_cache(maxsize=32)
def abstract_states(name: str, n: int) -> list[State]:
    """Shapes and types of the states with which the stages of a row begin, and last of the fitted one."""
    method, frozen = method_for(name), frozen_for(name)
    images = spec(method, frozen, n)
    return [abstract_state(method, frozen, images, stage) for stage in (*range(len(method.stages)), None)]


def assert_close(a: Any, b: Any, rtol: float) -> None:
    """Equal structures whose entries differ by `rtol` of the largest one at most."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = (np.asarray(jax.random.key_data(v) if is_key(v) else v) for v in (x, y))
        if np.issubdtype(x.dtype, np.floating):
            finite = np.abs(y[np.isfinite(y)])
            np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * float(finite.max(initial=0)))
        else:
            np.testing.assert_array_equal(x, y)


def is_key(leaf: Any) -> bool:
    """Whether a leaf holds random keys."""
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def assert_equal(a: Any, b: Any) -> None:
    """Equal to the last bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
