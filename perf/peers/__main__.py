"""`python -m edje.perf.peers`: as `edje bench peers`."""

import sys

from ..cli import app

app(args=["peers", *sys.argv[1:]], prog_name="edje bench")
