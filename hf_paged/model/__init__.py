"""The transformers model as the engine sees it: how its layers attend, a packed forward, and whether its weights
changed."""
