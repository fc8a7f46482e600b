"""Checkpoint to model bundle. `export.py` is the door; behind it torch, transformers and onnx."""
