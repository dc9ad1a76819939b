"""Visual anomaly detection in functional JAX: learn from normal images, score new ones, draw the heat map."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxad.detector import Detector, Prediction, load
    from jaxad.driver.mesh import make_mesh

__version__ = "0.1.0"
__all__ = ["Detector", "Prediction", "__version__", "load", "make_mesh"]


def __getattr__(name: str) -> Any:
    """Imports JAX only when the library is used, so that the command line answers `--help` at once."""
    if name in __all__:
        return getattr(importlib.import_module("jaxad.mesh" if name == "make_mesh" else "jaxad.detector"), name)
    raise AttributeError(f"module 'jaxad' has no attribute {name!r}")
