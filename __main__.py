"""`python -m edje`: the command line."""

import sys

from .runtime.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
