"""The command line."""

from jaxad.cli.main import main, refuse

__all__ = ["main", "refuse"]
