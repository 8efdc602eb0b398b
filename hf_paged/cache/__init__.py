"""Paged KV cache: who owns which page (`pages`, `prefix`), and the tensors themselves (`storage`)."""
