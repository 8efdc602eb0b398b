"""Quantised weights: linear layers that compute with them, and the checkpoint formats they are read from."""
