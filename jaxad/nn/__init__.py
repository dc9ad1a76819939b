"""Modules that several networks are trained with."""

from jaxad.nn.norm import ConvNorm, without_norm

__all__ = ["ConvNorm", "without_norm"]
