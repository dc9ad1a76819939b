"""Visual anomaly detection in functional JAX: learn from normal images, score new ones, draw the heat map."""

from jaxad.detector import Detector, Prediction, load

__version__ = "0.1.0"
__all__ = ["Detector", "Prediction", "__version__", "load"]
