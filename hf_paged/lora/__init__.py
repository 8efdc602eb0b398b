"""LoRA by request: adapters of PEFT's format on top of one model, several in a batch."""
