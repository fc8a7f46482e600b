"""Other ways to do what we do, measured beside us in one process; see `perf/PLAN.md`."""
