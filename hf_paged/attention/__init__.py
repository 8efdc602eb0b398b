"""Attention over pages: the seam to transformers (`interface`), what a kernel must offer (`backend`), and the
backends."""
