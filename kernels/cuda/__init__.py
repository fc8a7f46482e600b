"""Kernels in CUDA C++, for one GPU architecture each: what Triton cannot say. See the README."""
