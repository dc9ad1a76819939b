"""`python -m jaxad` and the command `jaxad`."""

import os
import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Runs the command line; Ctrl-C ends it with one line, also while modules are imported."""

    def interrupted(*_: object) -> NoReturn:
        os.write(2, b"jaxad: interrupted\n")
        os._exit(128 + signal.SIGINT)

    signal.signal(signal.SIGINT, interrupted)
    from jaxad import cli

    sys.exit(cli.main())


if __name__ == "__main__":
    main()
