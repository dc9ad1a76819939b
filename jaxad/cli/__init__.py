"""The command line."""

from jaxad.cli.main import COMMANDS, main, refuse

__all__ = ["COMMANDS", "main", "refuse"]
