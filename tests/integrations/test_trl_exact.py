"""Exact mode with TRL: the trainer's log-probabilities are the sampler's, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trl
from exactly import ON_GPU, ordered_products  # noqa: F401
from models.families import make_model
from peft import LoraConfig
from trainers import OPTIONS, make_trainer, metrics

pytest.importorskip("triton")

from hf_paged.attention.exact import EXACT
from hf_paged.integrations.trl import attach, detach

pytestmark = pytest.mark.skipif(
    not hasattr(trl.trainer.utils, "add_fused_lm_head"), reason="exact mode needs TRL's fused language-model head"
)

LORA = LoraConfig(r=4, lora_alpha=64, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"])
DIFFERENCE = "sampling/sampling_logp_difference/max"


@pytest.fixture(autouse=True)
def triton_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL computes its head as on a GPU: by its Triton kernels."""
    from trl.kernels import chunked_logprob

    for module in (chunked_logprob, trl.trainer.utils):
        monkeypatch.setattr(module, "_use_triton", lambda device: True)


def small(**changes: Any) -> Any:
    # Sizes that torch's vectorised loops on a CPU divide, whose ends are computed by other functions.
    return make_model("Llama", head_dim=32, num_hidden_layers=2, **changes)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Any]:
    def attached(**options: Any) -> Any:
        on_gpu: dict[str, Any] = {"use_cpu": False} if ON_GPU else {}
        changes = {"max_steps": 2, "max_completion_length": 6} | on_gpu | options
        return attach(make_trainer("GRPO", tmp_path, model=small(), **changes), exact=True, **OPTIONS)

    return attached


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(
            {"temperature": 0.7, "top_k": 20, "beta": 0.1, "gradient_checkpointing": False}, marks=pytest.mark.slow
        ),
        pytest.param({"peft": LORA, "temperature": 1.3, "repetition_penalty": 1.2}, marks=pytest.mark.slow),
    ],
    ids=["plain", "temperature-reference", "lora-penalty"],
)
def test_the_difference_is_zero(make: Callable[..., Any], options: dict[str, Any]) -> None:
    trainer = make(**options)
    trainer.train()
    assert metrics(trainer, DIFFERENCE) == [0.0, 0.0]
    assert metrics(trainer, "sampling/importance_sampling_ratio/min") == [1.0, 1.0]
    assert max(metrics(trainer, "grad_norm")) > 0


def test_without_it_the_difference_is_not_zero(tmp_path: Path) -> None:
    trainer = attach(make_trainer("GRPO", tmp_path, model=small(), max_steps=1), **OPTIONS)
    trainer.train()
    assert metrics(trainer, DIFFERENCE)[0] > 0.0


def test_attaching_again_and_detaching(make: Callable[..., Any]) -> None:
    trainer = make()
    lm = trainer.model
    assert attach(trainer, exact=True, **OPTIONS) is trainer, "an exact trainer can be attached to again"
    attach(trainer, exact=False, **OPTIONS)
    assert not any(hasattr(module.forward, "replaces") for module in lm.modules())
    attach(trainer, exact=True, **OPTIONS)
    assert hasattr(lm.forward, "replaces")
    detach(trainer)
    assert not any(hasattr(module.forward, "replaces") for module in lm.modules())
    assert lm.config._attn_implementation != EXACT


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("Mistral", {}, "sliding window"),
        ("Mixtral", {}, "mixture of experts"),
        ("Cohere", {"logit_scale": 0.5}, "logit_scale"),
        ("Llama", {"attention_dropout": 0.1}, "disable_dropout"),
    ],
)
def test_models_that_are_refused(tmp_path: Path, family: str, options: dict[str, Any], says: str) -> None:
    trainer = make_trainer("GRPO", tmp_path, model=make_model(family, **options))
    before = set(trainer.__dict__)
    with pytest.raises(ValueError, match=f"exact=True.*{says}"):
        attach(trainer, exact=True, **OPTIONS)
    assert set(trainer.__dict__) == before and not hasattr(trainer.model.forward, "replaces")


@pytest.mark.parametrize("name", ["torch_compile", "use_liger_kernel", "cast_lm_head_to_fp32"])
def test_arguments_that_are_refused(tmp_path: Path, name: str) -> None:
    trainer = make_trainer("GRPO", tmp_path, model=small())
    setattr(trainer.args, name, True)
    with pytest.raises(ValueError, match=name):
        attach(trainer, exact=True, **OPTIONS)


def test_a_trainer_without_the_fused_head_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer("GRPO", tmp_path, model=small())
    del trainer.model.__dict__["forward"]
    with pytest.raises(ValueError, match="upgrade trl"):
        attach(trainer, exact=True, **OPTIONS)
