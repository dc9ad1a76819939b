"""Settings of the whole suite: strict promotion, shape checks, a compile cache; and the folder of shared real data."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # XLA calls it from all of its threads at once
# The tests mostly compile, and code that is not optimized, fused by the older emitter, compiles twice as fast.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
)
# Threads of XLA: with no more than one a device, batched LAPACK calls on all devices wait for each other forever.
os.environ.setdefault("NPROC", "32")

import jax
import pytest

from tests.cases import CASES

ROOT = Path(__file__).resolve().parents[1]

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of one row of the conformance table run in one process, which fits it once."""
    for item in items:
        name = getattr(item, "callspec", None) and item.callspec.params.get("name")
        if isinstance(name, str) and name in CASES:
            item.add_marker(pytest.mark.xdist_group(name))


def _group(item: pytest.Item) -> tuple[Path, object]:
    """The module of a test, and the row of the table that it is of."""
    return item.path, getattr(item, "callspec", None) and item.callspec.params.get("name")


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """A process may map some 65,000 pieces of memory and a program takes a few: they are let go of group by group."""
    if nextitem is None or _group(item) != _group(nextitem):
        jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photographs and weights beside the project; tests that need it skip where it is absent."""
    folder = ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("needs the real data set folder ../shared, which is not part of the project")
    return folder


@pytest.fixture(autouse=True)
def _no_user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests never touch the user's cache of weights."""
    monkeypatch.setenv("JAXAD_CACHE", str(tmp_path / "cache"))
