"""`python -m jaxad` and the command `jaxad`."""

import sys
from typing import NoReturn

from jaxad import interruption, streams


def main() -> NoReturn:
    """Runs the command line; signals end it also while modules are imported, and all streams are open."""
    streams.prepare()
    interruption.watch()
    from jaxad import cli

    try:
        sys.exit(cli.main())
    finally:
        interruption.ignore()


if __name__ == "__main__":
    main()
