"""Visual anomaly detection in functional JAX: learn from normal images, score new ones, draw the heat map."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxad import methods
    from jaxad.data import open_data
    from jaxad.detector import Detector, Prediction, load
    from jaxad.driver.execution import Execution
    from jaxad.driver.fit import fit, fit_classes
    from jaxad.driver.mesh import make_mesh
    from jaxad.driver.scoring import score, score_classes

__version__ = "0.1.0"
__all__ = [
    "Detector",
    "Execution",
    "Prediction",
    "__version__",
    "fit",
    "fit_classes",
    "load",
    "make_mesh",
    "methods",
    "open_data",
    "score",
    "score_classes",
]

_MODULES = {
    "Detector": "detector",
    "Execution": "driver.execution",
    "Prediction": "detector",
    "fit": "driver.fit",
    "fit_classes": "driver.fit",
    "load": "detector",
    "make_mesh": "driver.mesh",
    "open_data": "data",
    "score": "driver.scoring",
    "score_classes": "driver.scoring",
}
"""Public name -> the module that defines it. JAX is imported on first use, so that the command line answers fast."""


def __getattr__(name: str) -> Any:
    if name == "methods":
        return importlib.import_module("jaxad.methods")
    if name in _MODULES:
        return getattr(importlib.import_module(f"jaxad.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'jaxad' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
