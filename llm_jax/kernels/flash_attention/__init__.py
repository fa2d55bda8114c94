"""Attention over a whole sequence without its scores in memory."""
