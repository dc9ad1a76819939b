"""Jitted functions that are compiled ahead of time."""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any

_seconds = [0.0]


def compile_seconds() -> float:
    """Seconds that this process has spent on compiling programs."""
    return sum(_seconds)


YNNPACK = "xla_cpu_experimental_ynn_fusion_type"
"""XLA's option for what YNNPACK computes on a CPU: of its default (jaxlib 0.10.2), all but convolutions, which Eigen
computes faster."""


@functools.cache
def compiler_options() -> dict[str, str | bool]:
    """XLA's options for a program; none where the user has set them, or jaxlib does not have them.

    Several devices of one CPU keep to YNNPACK, which rounds an image's features alike however the images are split.
    """
    options: dict[str, str | bool] = {YNNPACK: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"}
    if jax.default_backend() != "cpu" or jax.device_count() > 1 or YNNPACK in os.environ.get("XLA_FLAGS", ""):
        return {}
    try:
        jax.jit(jnp.negative).lower(0.0).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError:
        return {}
    return options


class Program:
    """A jitted function that compiles ahead of time, so that compile time is told apart from run time.

    Args:
        fn: The function.
        active: Gives the context in which it is traced and runs: the mesh.
        shardings: Gives the shardings of the result, from its shapes; None leaves them to XLA.
        options: Those of `jax.jit`.
    """

    def __init__(
        self,
        fn: Callable,
        *,
        active: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        shardings: Callable[[PyTree], PyTree] | None = None,
        **options: Any,
    ) -> None:
        self._fn, self._active, self._shardings, self._options = fn, active, shardings, options
        self._executables: dict[Hashable, Any] = {}

    def __call__(self, *args: PyTree) -> Any:
        """The function's result; compiles where the arguments have new shapes or types."""
        with self._active():
            return self.compile(*args)(*args)

    def compile(self, *args: PyTree) -> Any:
        """The executable for arguments of these shapes and types (`jax.ShapeDtypeStruct`s will do)."""
        leaves, tree = jax.tree.flatten(args)
        kinds = ((jnp.shape(leaf), jnp.result_type(leaf), bool(getattr(leaf, "weak_type", False))) for leaf in leaves)
        key = (tree, tuple(kinds))
        if key not in self._executables:
            started = time.perf_counter()
            with self._active():
                options = dict(self._options)
                if self._shardings is not None:
                    options["out_shardings"] = self._shardings(jax.eval_shape(self._fn, *args))
                lowered = jax.jit(self._fn, **options).lower(*args)
                self._executables[key] = lowered.compile(compiler_options=compiler_options())
            _seconds.append(time.perf_counter() - started)
        return self._executables[key]
