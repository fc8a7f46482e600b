"""Checkpoint to model bundle; the only layer that imports torch, transformers and onnx."""
