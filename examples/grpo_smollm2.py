"""GRPO with TRL on a small real model, rollouts by hf_paged: SmolLM2-135M learns to like words that begin with an s.

python examples/grpo_smollm2.py                               some five minutes on two CPU cores
python examples/grpo_smollm2.py --lora                        LoRA adapters instead of all weights
python examples/grpo_smollm2.py --stock                       the same without hf_paged, to compare
python examples/grpo_smollm2.py --device cuda --model Qwen/Qwen3-0.6B --completions 64 --max-tokens 256
python examples/grpo_smollm2.py --device cuda --model qwen3-0.6b      random weights in that shape
"""

from __future__ import annotations

import argparse
import functools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from hf_paged.bench.models import SHAPES, load_smollm2, random_model
from hf_paged.integrations.trl import attach

BEGINNINGS = [
    "The sea is",
    "In the morning the old man",
    "On the table there is",
    "My sister likes",
    "The town has",
    "At night we",
    "The garden behind the house",
    "She said that",
    "In winter the birds",
    "For breakfast there was",
    "The ship carried",
    "All summer long",
]


def alliteration(completions: list[str], **_: Any) -> list[float]:
    """Different words that begin with an s, per word of a completion."""
    words = [re.findall("[a-z]+", completion.lower()) for completion in completions]
    return [len({word for word in row if word.startswith("s")}) / max(len(row), 1) for row in words]


class Stopwatch:
    """Seconds spent in a function, over all its calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def load(name: str | None, device: str) -> tuple[Any, Any]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if name is None:
        return load_smollm2(dtype)
    if name in SHAPES:
        return random_model(SHAPES[name](), dtype, device), load_smollm2()[1]
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), AutoTokenizer.from_pretrained(name)


def plot(history: list[dict[str, float]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.5))
    axis.plot([row["step"] for row in history], [row["reward"] for row in history], marker="o", markersize=3)
    axis.set(xlabel="optimizer step", ylabel="reward: different words with an s")
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"what AutoModelForCausalLM loads, or random weights: {', '.join(SHAPES)}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--completions", type=int, default=16, help="per step; eight of each prompt")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--stock", action="store_true", help="leave generation to TRL and transformers")
    parser.add_argument("--out", type=Path, default=Path("grpo.png"))
    options = parser.parse_args()

    torch.manual_seed(0)
    model, tokenizer = load(options.model, options.device)
    peft = None
    if options.lora:
        from peft import LoraConfig

        peft = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    rewarding, generating = Stopwatch(), Stopwatch()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=rewarding.around(alliteration),
        args=GRPOConfig(
            output_dir="grpo_out",
            max_steps=options.steps,
            per_device_train_batch_size=options.completions,
            num_generations=8,
            max_completion_length=options.max_tokens,
            learning_rate=1e-3 if options.lora else 2e-4,
            lr_scheduler_type="constant",
            bf16=options.device == "cuda",
            use_cpu=options.device == "cpu",
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": BEGINNINGS}),
        processing_class=tokenizer,
        peft_config=peft,
    )
    if not options.stock:
        attach(trainer)  # the one line
    trainer._generate_single_turn = generating.around(trainer._generate_single_turn)

    start = time.perf_counter()
    trainer.train()
    total = time.perf_counter() - start

    history = [row for row in trainer.state.log_history if "reward" in row]
    plot(history, options.out)
    tokens = sum(row["completions/mean_length"] for row in history) * options.completions
    few = max(1, len(history) // 5)
    mean = [sum(row["reward"] for row in part) / few for part in (history[:few], history[-few:])]
    print(f"\nreward, mean of the first and the last {few} steps: {mean[0]:.3f} -> {mean[1]:.3f}")
    print("the last completions:")
    for prompt, completion in list(zip(trainer._logs["prompt"], trainer._logs["completion"], strict=True))[::8]:
        print("  " + " ".join((prompt + completion).split()))
    print(f"generation {generating.seconds:.1f} s ({tokens / generating.seconds:.0f} tokens/s)")
    print(f"reward     {rewarding.seconds:.1f} s")
    print(f"training   {total - generating.seconds - rewarding.seconds:.1f} s")
    if not options.stock:
        worst = max(row["sampling/sampling_logp_difference/max"] for row in history)
        print(f"largest difference between the sampler's and the trainer's log-probability of a token: {worst:.1e}")
    print(f"the picture of it: {options.out}")


if __name__ == "__main__":
    main()
