"""TRL on a small real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from trainers import make_config, metrics, variety
from trl import GRPOTrainer

from hf_paged.bench.models import load_smollm2
from hf_paged.integrations.trl import attach

LORA = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")


@pytest.mark.slow
@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_the_trainer_agrees_with_the_sampler(smollm2_dir: str, tmp_path: Path, peft: Any) -> None:
    """In float32 the log-probabilities are the trainer's own, before and after an optimizer step."""
    from datasets import Dataset

    model, tokenizer = load_smollm2()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=variety,
        args=make_config("GRPO", tmp_path, max_completion_length=6, learning_rate=1e-4, gradient_checkpointing=False),
        train_dataset=Dataset.from_dict({"prompt": ["The sea is", "My sister likes", "At night we"]}),
        processing_class=tokenizer,
        peft_config=peft,
    )
    attach(trainer, num_pages=64)
    trainer.train()
    means = metrics(trainer, "sampling/sampling_logp_difference/mean")
    assert len(means) == 2 and max(means) < 1e-4
    assert max(metrics(trainer, "grad_norm")) > 0
