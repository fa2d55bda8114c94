"""Measuring: honest timing, and what a step must cost at least."""
