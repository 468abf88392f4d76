"""``python -m distilljax`` is the console script ``distilljax``."""

import sys

from distilljax.cli import main

if __name__ == "__main__":
    sys.exit(main())
