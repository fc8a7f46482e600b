"""TensorRT and TensorRT-RTX: one graph, two libraries of nearly one interface."""
