"""Smaller models: weights in int8."""
