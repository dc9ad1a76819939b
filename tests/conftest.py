"""Settings of the whole suite: strict promotion, shape checks, a compilation cache; and which tests run when."""

import os
import re
from pathlib import Path

from tests.flags import xla_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # XLA calls it from all of its threads at once
if "XLA_FLAGS" not in os.environ:  # workers of xdist inherit those of the process that starts them
    os.environ["XLA_FLAGS"] = xla_flags()
# Threads of XLA: with no more than one a device, batched LAPACK calls on all devices wait for each other forever.
os.environ.setdefault("NPROC", "32")

import jax
import pytest

from jaxad.driver.embedding import embed_program
from jaxad.driver.programs import fit_programs, score_program
from tests import rows as fitted_rows
from tests.cases import CASES

ROOT = Path(__file__).resolve().parents[1]
MAX_MAPPINGS = 20_000

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # to write a small one takes longer
jax.config.update("jax_traceback_in_locations_limit", 0)  # programs without the lines of Python that made them


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run what `make test` leaves to `make test-all`")
    parser.addoption("--rows", default="", help="rows of the conformance table to run, a,b,...; none: all")
    parser.addoption("--method", default="", help="run only the tests of one method: its rows, its file, its recipes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: runs in `make test-all` only")


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Selects tests; those of a row, or else of a file, run in one process, which fits it and makes fixtures once."""
    method, slow, rows = (config.getoption(option) for option in ("--method", "--slow", "--rows"))
    chosen = [
        item
        for item in items
        if (slow or item.get_closest_marker("slow") is None)
        and (not method or _is_about(item, method))
        and (not rows or _row(item) is None or _row(item) in rows.split(","))
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = sorted(chosen, key=lambda item: _row(item) or "")
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))


def _row(item: pytest.Item) -> str | None:
    """The row of the conformance table that a test is about."""
    name = getattr(item, "callspec", None) and item.callspec.params.get("name")
    return name if isinstance(name, str) and name in CASES else None


def _is_about(item: pytest.Item, method: str) -> bool:
    """Whether a test is about a method: a row of it, its own file, a test that has its name, or what all must have."""
    name = _row(item)
    if name is not None:
        return CASES[name].method == method
    if item.name in ("test_a_method_is_complete", "test_a_method_has_a_recipe"):
        return True
    return bool(re.search(rf"(?<![a-z0-9]){method}(?![a-z0-9]|_ad)", item.nodeid))


def _group(item: pytest.Item) -> str:
    return _row(item) or str(item.path.relative_to(ROOT))


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Frees the programs of a row when it is done, and all programs before the process runs out of memory mappings.

    Linux allows some 65,000 of them, and a program takes a few.
    """
    last = nextitem is None or _group(item) != _group(nextitem)
    if last:
        for cached in (fitted_rows.row, fit_programs, score_program):
            cached.cache_clear()
    if (last or item.get_closest_marker("slow")) and _mappings() > MAX_MAPPINGS:
        for cached in (fit_programs, score_program, embed_program):
            cached.cache_clear()
        jax.clear_caches()


def _mappings() -> int:
    """Memory mappings of this process; where they cannot be counted, more than allowed."""
    try:
        with open("/proc/self/maps", "rb") as lines:
            return sum(1 for _ in lines)
    except OSError:
        return MAX_MAPPINGS + 1


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photographs and weights beside the project; tests that need it skip where it is absent."""
    folder = ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("needs the real data set folder ../shared, which is not part of the project")
    return folder


@pytest.fixture(autouse=True)
def _no_user_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests never touch the user's cache of weights and programs, nor does theirs lie among their results."""
    monkeypatch.setenv("JAXAD_CACHE", str(tmp_path_factory.mktemp("cache")))
