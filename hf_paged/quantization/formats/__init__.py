"""Checkpoint formats, one a file."""
