"""From logits to tokens: adjustments (`processors`), the draw (`draw`), log-probabilities, and the `sampler` that
orders them."""
