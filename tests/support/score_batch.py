"""A program: `score_batch.py ENGINE BATCH OUT` scores the arrays of an `.npz` with an engine."""

import sys

import numpy as np

from edje.engines.contract import Batch
from edje.engines.fidelity import engine_scorer
from edje.engines.registry import open_engine

engine = open_engine(sys.argv[1])
with np.load(sys.argv[2]) as arrays:
    batch = Batch(**arrays)
np.save(sys.argv[3], engine_scorer(engine)(batch))
engine.close()
