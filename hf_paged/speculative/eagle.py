"""EAGLE-3 heads (arXiv 2503.01840): one decoder layer that drafts from a target model's hidden states.

At position p a head gets the target's hidden states of p, from a low, a middle and a high layer, and the embedding of
token p + 1; it predicts token p + 2. Where the target has not been yet, the head's own output stands in for the hidden
states. Modules and tensors are named as in published checkpoints.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

logger = logging.getLogger(__name__)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries `[T, heads, dim]`, keys and values `[T, kv_heads, dim]` -> `[T, heads, dim]`."""

ARCHITECTURE = "LlamaForCausalLMEagle3"
AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"


class _Projections(nn.Module):
    """Of attention over embeddings and hidden states side by side."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        size, bias = 2 * config.hidden_size, config.attention_bias
        heads, kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(size, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(size, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(size, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=bias)


class _MidLayer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = _Projections(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Eagle3Head(nn.Module):
    """The head of one target model, over packed rows.

    Args:
        config: as in the checkpoint's config.json. Beside what a Llama has: `draft_vocab_size` (all of the vocabulary
            where it is missing), `target_hidden_size` (the head's own), `eagle_aux_hidden_state_layer_ids`, there or in
            `eagle_config`, and `norm_before_residual`.
        own_embedding: whether it has embeddings of its own; else it shares the target's.
    """

    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: LlamaConfig, *, own_embedding: bool = False) -> None:
        super().__init__()
        self.config = config
        named = getattr(config, AUX_LAYERS, None) or (getattr(config, "eagle_config", None) or {}).get(AUX_LAYERS)
        self._named_layers: list[int] | None = list(named) if named else None
        self.target_hidden_size: int = getattr(config, "target_hidden_size", None) or config.hidden_size
        self.draft_vocab_size: int = getattr(config, "draft_vocab_size", None) or config.vocab_size
        self.fc = nn.Linear(len(named or range(3)) * self.target_hidden_size, config.hidden_size, bias=False)
        self.midlayer = _MidLayer(config)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, self.draft_vocab_size, bias=False)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size) if own_embedding else None
        self.register_buffer("d2t", torch.zeros(self.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        self.draft_tokens(torch.arange(self.draft_vocab_size))
        self._rotary = LlamaRotaryEmbedding(config)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Eagle3Head:
        # A cast of the head must not round the frequencies.
        frequencies = {name: buffer.clone() for name, buffer in self._rotary.named_buffers()}
        super()._apply(fn, recurse)
        for name, buffer in frequencies.items():
            setattr(self._rotary, name, buffer.to(self.fc.weight.device))
        return self

    def draft_tokens(self, token_ids: Tensor) -> None:
        """Says which tokens the head can draft: int64 `[draft_vocab_size]`, ascending ids of the target's."""
        own = torch.arange(self.draft_vocab_size, device=token_ids.device)
        self.d2t.copy_(token_ids - own)
        self.t2d.zero_()
        self.t2d[token_ids] = True

    def aux_layers(self, num_layers: int) -> list[int]:
        """Which of a target's so many decoder layers the head reads the outputs of, from 0 on.

        Checkpoints count in two ways, and tell which by the first one: 1 is an output, as here; 2 is the same state
        as an input of the next layer, as in EAGLE's own code and in what is taken where nothing is said.

        Raises:
            ValueError: the target has no such layers.
        """
        named = self._named_layers
        outputs = named if named and named[0] == 1 else [i - 1 for i in named or (2, num_layers // 2, num_layers - 3)]
        if not all(0 <= i < num_layers for i in outputs):
            what = f"{AUX_LAYERS} {named}" if named else f"of its own choice (config.json names no {AUX_LAYERS})"
            raise ValueError(f"the EAGLE-3 head reads layers {what}, and the target has {num_layers}")
        return outputs

    # ---- forward -----------------------------------------------------------------------------------------------

    def fuse(self, hidden_states: Tensor) -> Tensor:
        """The target's hidden states `[T, layers * target_hidden_size]` -> `[T, H]`."""
        return self.fc(hidden_states.to(self.fc.weight.dtype))

    def keys_values(self, embeddings: Tensor, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[T, kv_heads, dim]` alone; arguments as in `forward`."""
        attention = self.midlayer.self_attn
        inputs = self._attention_inputs(embeddings, self.midlayer.hidden_norm(hidden))
        keys, values = self._heads(attention.k_proj(inputs)), self._heads(attention.v_proj(inputs))
        return apply_rotary_pos_emb(keys, keys, *self._rotation(keys, positions))[1], values

    def forward(self, embeddings: Tensor, hidden: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """One step of every row.

        Args:
            embeddings: `[T, H]`, of the tokens at `positions + 1`.
            hidden: `[T, H]`, fused hidden states of the target's at `positions`, or what the head returned for the
                position before.
            positions: int64 `[T]`.
            attend: attention over earlier positions and these.

        Returns:
            `[T, H]`, what `logits` takes, and what stands in for the hidden states at `positions + 1`.
        """
        layer, attention = self.midlayer, self.midlayer.self_attn
        normed = layer.hidden_norm(hidden)
        residual = normed if getattr(self.config, "norm_before_residual", False) else hidden
        inputs = self._attention_inputs(embeddings, normed)
        queries, keys, values = (self._heads(p(inputs)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        queries, keys = apply_rotary_pos_emb(queries, keys, *self._rotation(keys, positions))
        hidden = residual + attention.o_proj(attend(queries, keys, values).flatten(1))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """`[T, H]` -> `[T, draft_vocab_size]`, of the tokens at `positions + 2`."""
        return self.lm_head(self.norm(hidden))

    def target_logits(self, hidden: Tensor) -> Tensor:
        """As `logits` over the target's vocabulary `[T, V]`; tokens that the head does not know have -inf."""
        logits = self.logits(hidden)
        everywhere = logits.new_full((len(logits), self.config.vocab_size), -torch.inf)
        everywhere[:, torch.arange(self.draft_vocab_size, device=logits.device) + self.d2t] = logits
        return everywhere

    def _attention_inputs(self, embeddings: Tensor, normed: Tensor) -> Tensor:
        return torch.cat([self.midlayer.input_layernorm(embeddings), normed], dim=-1)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.midlayer.self_attn.head_dim))

    def _rotation(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._rotary(like, positions[None])
        return cos[0], sin[0]

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors, as published heads have them."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config.to_diff_dict() | {"architectures": [ARCHITECTURE], "num_hidden_layers": 1}
        config |= {"draft_vocab_size": self.draft_vocab_size, "dtype": str(self.fc.weight.dtype).removeprefix("torch.")}
        # Said in the older way, which everybody reads.
        rope: Any = dict(config.pop("rope_parameters"))
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_head(source: Any, dtype: torch.dtype) -> Eagle3Head:
    """A head out of a published checkpoint, on the CPU, in eval mode.

    Args:
        source: a folder with config.json and *.safetensors or pytorch_model.bin; the name of such a repository on the
            hub; or an `Eagle3Head`, which is returned as it is.
        dtype: of the loaded weights.

    Raises:
        FileNotFoundError: no such folder or repository, or a file is missing.
        ValueError: the checkpoint is not an EAGLE-3 head, or a tensor is missing, too many or of another shape.
        TypeError: `source` is something else.
    """
    if isinstance(source, Eagle3Head):
        return source
    if not isinstance(source, str | Path):
        raise TypeError(f"an EAGLE-3 head is given by its path or as an Eagle3Head, got {type(source).__name__}")
    folder = _folder(source)
    file, tensors = _read_tensors(folder)
    tensors = {_module_name(name): tensor for name, tensor in tensors.items()}
    head = Eagle3Head(_read_config(folder, tensors), own_embedding="embed_tokens.weight" in tensors)
    expected = head.state_dict()
    for name, tensor in expected.items():
        if name not in tensors and name not in ("d2t", "t2d"):
            raise ValueError(f"{file}: the tensor {name} of an EAGLE-3 head is missing")
        if name in tensors and tensors[name].shape != tensor.shape:
            raise ValueError(
                f"{file}: the tensor {name} must have the shape {list(tensor.shape)} by config.json, and has "
                f"{list(tensors[name].shape)}"
            )
    for name in tensors:
        if name not in expected and "rotary_emb" not in name:
            raise ValueError(f"{file}: the tensor {name} has no place in an EAGLE-3 head of the kind that is supported")
    head.load_state_dict({name: tensors.get(name, tensor) for name, tensor in expected.items()})
    tokens = head.d2t + torch.arange(head.draft_vocab_size)
    if int(tokens.min()) < 0 or int(tokens.max()) >= head.config.vocab_size:
        raise ValueError(f"{file}: d2t leads out of the vocabulary of {head.config.vocab_size} tokens")
    return head.to(dtype).eval()


def _module_name(name: str) -> str:
    """A tensor's name in `Eagle3Head`; some checkpoints count the one layer, or put a model around it."""
    return name.removeprefix("model.").replace("layers.0.", "midlayer.", 1)


def _folder(source: str | Path) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=["config.json", "*.safetensors", "*.bin"]))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no EAGLE-3 head at {str(source)!r}: it is neither a folder nor a repository that can be had ({error})"
        ) from error


def _read_config(folder: Path, tensors: dict[str, Tensor]) -> LlamaConfig:
    file = folder / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: an EAGLE-3 head is a folder with config.json and its weights")
    values = json.loads(file.read_text())
    values = values.get("transformer_layer_config", {}) | values  # some keep what is Llama's apart
    if "fc.weight" not in tensors or "hidden_size" not in values:
        raise ValueError(
            f"{folder} does not hold an EAGLE-3 head ({ARCHITECTURE}): its config.json is of "
            f"{values.get('architectures')}, and its tensors are {', '.join(sorted(tensors)[:4])}..."
        )
    return LlamaConfig(**{name: value for name, value in values.items() if name not in ("model_type", "auto_map")})


def _read_tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """(file to name in errors, all tensors)."""
    files = sorted(folder.glob("*.safetensors"))
    if files:
        from safetensors.torch import load_file

        found = [load_file(file) for file in files]
        return files[0] if len(files) == 1 else folder, {n: t for tensors in found for n, t in tensors.items()}
    file = folder / "pytorch_model.bin"
    if not file.exists():
        raise FileNotFoundError(f"{folder} has neither *.safetensors nor pytorch_model.bin: no EAGLE-3 head is there")
    return file, torch.load(file, map_location="cpu", weights_only=True)
