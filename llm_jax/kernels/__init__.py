"""Kernels: what XLA does not do well, each beside its meaning in jax.numpy. They import jax alone."""
