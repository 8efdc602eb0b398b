"""Small TRL trainers for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from models.families import make_model
from models.tiny_tokenizer import make_tokenizer

TEXTS = ["tea for two", "the sea is", "one more", "a"]
OPTIONS = {"page_size": 8, "num_pages": 128, "max_num_seqs": 16}


def variety(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward: how many different tokens a completion has."""
    return [float(len(set(ids))) for ids in completion_ids]


def make_config(kind: str, out: Path, **changes: Any) -> Any:
    """A config of `trl`'s `{kind}Config`: float32 on the CPU, nothing written but logs in memory."""
    import trl

    options: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_completion_length": 10,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if kind != "Distillation":
        options["num_generations"] = 4
    return getattr(trl, f"{kind}Config")(**(options | changes))


def make_trainer(
    kind: str,
    out: Path,
    *,
    model: Any = None,
    reward: Any = variety,
    peft: Any = None,
    tools: list[Any] | None = None,
    rows: Dataset | None = None,
    processing_class: Any = None,
    **changes: Any,
) -> Any:
    """A trainer that nothing is attached to.

    Args:
        kind: "GRPO", "RLOO" or "Distillation".
        changes: fields of its config.
    """
    import trl

    options: dict[str, Any] = {"reward_funcs": reward}
    if tools:
        options["tools"] = tools
    if kind == "Distillation":
        options = {"teacher_model": make_model("Llama", seed=1)}
    model = model or make_model("Llama")
    model.save_pretrained(out / "model")
    model.config._name_or_path = str(out / "model")  # where TRL looks for the reference model
    rows = rows or Dataset.from_dict({"prompt": TEXTS * 4})
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        args=make_config(kind, out, **changes),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        processing_class=processing_class or make_tokenizer(),
        peft_config=peft,
        **options,
    )


def metrics(trainer: Any, name: str) -> list[float]:
    """A logged metric, step by step."""
    return [row[name] for row in trainer.state.log_history if name in row]
