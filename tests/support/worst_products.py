"""A program: prints the largest error of int8 products at operands whose sums are largest.

Arguments: ONNX models of one product each, with activations [M, K] of unsigned bytes as input and
float32 sums [M, N] as output. The rows of 255 at a weight's positive places, and at its negative
ones, come with each model as `NAME.npz`: `rows`, and the exact `sums`.
"""

import sys

import numpy as np
import onnxruntime

for name in sys.argv[1:]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(name, options, providers=["CPUExecutionProvider"])
    with np.load(f"{name}.npz") as case:
        found = session.run(None, {"rows": case["rows"]})[0]
        print(np.abs(found - case["sums"]).max())
