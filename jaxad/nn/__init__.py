"""Flax modules that several methods train."""

from jaxad.nn.norm import ConvNorm, without_norm

__all__ = ["ConvNorm", "without_norm"]
