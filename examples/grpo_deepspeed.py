"""GRPO over several GPUs with DeepSpeed: the trainer is as ever, and so is the line.

accelerate launch --config_file zero2.yaml examples/grpo_deepspeed.py Qwen/Qwen3-0.6B

`accelerate config` writes such a file; TRL has some in `trl/accelerate_configs` (`deepspeed_zero2.yaml`,
`deepspeed_zero3.yaml`). With ZeRO-3 the parameters are gathered for each rollout and released after it.
"""

import importlib.util
import sys

import torch
from datasets import Dataset
from trl import GRPOConfig

from hf_paged.integrations.trl import HFPagedGRPOTrainer

if importlib.util.find_spec("deepspeed") is None:
    sys.exit("this example needs DeepSpeed: pip install deepspeed (and a CUDA toolkit; see its documentation)")
if len(sys.argv) != 2:
    sys.exit(__doc__)


def brevity(completion_ids: list[list[int]], **_: object) -> list[float]:
    """More for shorter completions."""
    return [1.0 - len(ids) / 256 for ids in completion_ids]


questions = ["Why is the sky blue?", "What is a lighthouse for?", "What do bees make?", "Who writes books?"] * 64
trainer = HFPagedGRPOTrainer(
    model=sys.argv[1],
    reward_funcs=brevity,
    args=GRPOConfig(
        output_dir="grpo_out",
        max_steps=20,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=256,
        model_init_kwargs={"dtype": torch.bfloat16},
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    ),
    train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in questions]}),
)
trainer.train()
