"""Ragged paged attention."""
