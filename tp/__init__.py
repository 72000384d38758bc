"""Tensor parallelism, applied to the model from outside."""
