"""Jitted functions that are compiled ahead of time."""

import contextlib
import functools
import os
import threading
import time
import weakref
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxad.driver import fork

PyTree = Any

_compilations: list[tuple[float, float]] = []
"""The seconds of each, and its CPU seconds."""


def compile_seconds() -> float:
    """Seconds that this process has spent compiling programs."""
    return sum(seconds for seconds, _ in _compilations)


def cpu_seconds() -> float:
    """CPU seconds of this process, all threads, but for those in which it compiled programs."""
    return time.process_time() - sum(seconds for _, seconds in _compilations)


def compile_count() -> int:
    """Programs that this process has compiled."""
    return len(_compilations)


YNNPACK = "xla_cpu_experimental_ynn_fusion_type"
"""XLA's option for what YNNPACK computes on a CPU: its default (jaxlib 0.10.2) without convolutions, in which Eigen is
faster."""


@functools.cache
def compiler_options() -> dict[str, str | bool]:
    """XLA's options for a program; none where the user sets them, or jaxlib does not know them.

    Several virtual devices of one CPU keep YNNPACK, which rounds the features of an image alike however the images are
    split.
    """
    options: dict[str, str | bool] = {YNNPACK: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"}
    if jax.default_backend() != "cpu" or jax.device_count() > 1 or YNNPACK in os.environ.get("XLA_FLAGS", ""):
        return {}
    try:
        jax.jit(jnp.negative).lower(0.0).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def keep_compiled(folder: Path) -> None:
    """Keeps compiled programs in a folder for later processes; not where the user has set JAX's own cache, or another.

    Args:
        folder: Created where missing; one that cannot be written is left alone.
    """
    option = "jax_compilation_cache_dir"
    if getattr(jax.config, option) is not None:
        return
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        jax.config.update(option, str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # to write a small one takes longer


class Program:
    """A jitted function that compiles ahead of time, so that compile time is measured apart from run time.

    Args:
        fn: The function.
        ambient: Gives the context in which it is traced and runs: the mesh.
        shardings: Gives the shardings of the result, from its shapes; None leaves them to XLA.
        options: Those of `jax.jit`.
    """

    def __init__(
        self,
        fn: Callable,
        *,
        ambient: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        shardings: Callable[[PyTree], PyTree] | None = None,
        **options: Any,
    ) -> None:
        self._fn, self._ambient, self._shardings, self._options = fn, ambient, shardings, options
        self._executables: dict[Hashable, Any] = {}
        self._compiling = threading.Lock()

    def __call__(self, *args: PyTree) -> Any:
        """The function's result; compiles where the arguments have new shapes or types."""
        with self._ambient():
            return self.compile(*args)(*args)

    def compile(self, *args: PyTree) -> Any:
        """The executable for arguments of these shapes and types (`jax.ShapeDtypeStruct`s will do)."""
        fork.check()
        leaves, structure = jax.tree.flatten(args)
        types = ((jnp.shape(leaf), jnp.result_type(leaf), bool(getattr(leaf, "weak_type", False))) for leaf in leaves)
        key = (structure, tuple(types))
        if key not in self._executables:
            with self._compiling:
                if key not in self._executables:
                    self._executables[key] = self._compiled(args)
        return self._executables[key]

    def _compiled(self, args: tuple[PyTree, ...]) -> Any:
        started, worked = time.perf_counter(), time.process_time()
        with self._ambient():
            options = dict(self._options)
            if self._shardings is not None:
                options["out_shardings"] = self._shardings(jax.eval_shape(self._fn, *args))
            executable = jax.jit(self._fn, **options).lower(*args).compile(compiler_options=compiler_options())
        _compilations.append((time.perf_counter() - started, time.process_time() - worked))
        return executable


RECENT = 64
"""Results that `weak_cache` keeps though nothing refers to them."""

Made = TypeVar("Made")


def weak_cache(make: Callable[..., Made]) -> Callable[..., Made]:
    """Keeps what `make` returns for equal arguments: the last `RECENT` results, and all that something refers to.

    So the programs of a model that is in use never compile again, however many models there are.
    """
    alive: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()
    lock = threading.Lock()

    @functools.lru_cache(RECENT)
    def recent(*key: Hashable) -> Made:
        made = alive.get(key)
        if made is None:
            made = alive[key] = make(*key)
        return made

    @functools.wraps(make)
    def get(*key: Hashable) -> Made:
        with lock:
            return recent(*key)

    vars(get)["cache_clear"] = recent.cache_clear
    return get
