"""Tiny random-weight models, one per architecture. Their weights are wide enough that greedy output is not constant."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCAB = 160
WINDOW = 24
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = {"moe_intermediate_size": 48, "num_experts_per_tok": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"head_dim": 16, "sliding_window": WINDOW},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "Qwen3Moe": {"head_dim": 16, "num_experts": 4, "decoder_sparse_step": 1, **MOE},
    "Gemma2": {
        "num_hidden_layers": 4,
        "tie_word_embeddings": False,  # tied, a random Gemma repeats its last token for ever
        "head_dim": 16,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 8.0,
    },
    "Gemma3": {
        "num_hidden_layers": 4,
        "tie_word_embeddings": False,
        "head_dim": 16,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 24,
    },
    "Phi3": {"sliding_window": WINDOW},
    "GptOss": {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "Olmo2": {},
    "Cohere": {"logit_scale": 1.0},
    "Glm4": {"head_dim": 16},
    "Granite": {"attention_multiplier": 0.4, "residual_multiplier": 0.7, "embedding_multiplier": 3.0},
    "SmolLM3": {"num_hidden_layers": 4, "no_rope_layer_interval": 2},
    "DeepseekV3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        **MOE,
    },
}
"""Config changes by the family's class prefix."""

WINDOWED = {"Mistral", "Gemma2", "Gemma3", "Phi3", "GptOss"}


def config_class(family: str) -> type:
    """The config class of a family's text model."""
    return getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")


def make_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A seeded float32 causal LM in eval mode, in the attention implementation that transformers picks for it."""
    config = config_class(family)(**(BASE | FAMILIES.get(family, {}) | changes))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" not in name:  # biases and sinks start at zero: give them something to say
                parameter.copy_(torch.randn_like(parameter) * 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    if family == "Gemma2":  # transformers 5.17 picks sdpa for it, which leaves out the soft cap
        model.set_attn_implementation("eager")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def make_prompts(lengths: list[int], seed: int = 1) -> list[list[int]]:
    """Random token ids, none of them the pad or end-of-sequence id."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def left_pad(prompts: list[list[int]], pad: int = 0) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of a left-padded batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def stock_greedy(model: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
    """The new tokens of transformers' own greedy generation, one prompt, past any end-of-sequence id."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens)
    return out[0, len(prompt) :].tolist()
