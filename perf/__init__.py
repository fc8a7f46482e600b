"""Benchmarks: every figure with its conditions, checked for right output in the same run."""
