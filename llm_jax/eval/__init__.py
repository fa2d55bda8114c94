"""Evaluation: predictions to numbers, numbers to pictures."""
