"""`python -m jaxad`."""

import sys

from jaxad.cli import main

if __name__ == "__main__":
    sys.exit(main())
