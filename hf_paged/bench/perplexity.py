"""How well models predict a text: what quantisation costs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

import hf_paged
from hf_paged.bench.models import free_memory, load_smollm2
from hf_paged.text_file import read_text


@torch.no_grad()
def perplexity(model: Any, token_ids: Tensor, window: int = 512) -> float:
    """exp of the mean negative log-likelihood of a text's tokens, computed by the model's own forward.

    Args:
        model: a causal LM.
        token_ids: int64 `[T]`.
        window: the text is cut into pieces of so many tokens, each predicted from its own beginning; its first token
            is not counted.

    Raises:
        ValueError: nothing is left to predict.
    """
    device = next(model.parameters()).device
    pieces = [piece for piece in token_ids.split(window) if len(piece) > 1]
    if not pieces:
        raise ValueError(f"nothing to predict in a text of {len(token_ids)} tokens in windows of {window}")
    loss = 0.0
    for piece in pieces:
        ids = piece.to(device)
        logits = model(ids[None], use_cache=False).logits[0, :-1]
        loss += float(F.cross_entropy(logits.float(), ids[1:], reduction="sum"))
    return float(torch.tensor(loss / sum(len(piece) - 1 for piece in pieces)).exp())


def run_perplexity(
    models: Sequence[str],
    text: Path,
    *,
    window: int = 512,
    dtype: str | None = None,
    device: str | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Loads one model after the other and has it predict a text.

    Args:
        models: "smollm2", folders, or names on the hub.

    Raises:
        FileNotFoundError: no such text or model.
    """
    content = read_text(text, "text")
    rows = []
    for name in models:
        log(f"{name} ...")
        model, tokenizer = _load(name, dtype, device)
        ids = tokenizer(content, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
        start = time.perf_counter()
        found = perplexity(model, ids, window)
        tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
        rows.append(
            {
                "model": name,
                "perplexity": found,
                "tokens": len(ids),
                "weight_bytes": sum(tensors.values()),
                "seconds": time.perf_counter() - start,
            }
        )
        del model
        free_memory()
    return {"text": str(text), "window": window, "models": rows}


def as_table(result: dict[str, Any]) -> Table:
    """What `run_perplexity` found; ratios to the first model."""
    table = Table(title=f"{result['text']} in windows of {result['window']} tokens")
    for column in ("model", "perplexity", "ratio", "weights, MB", "tokens", "s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in result["models"]:
        table.add_row(
            row["model"],
            f"{row['perplexity']:.3f}",
            f"{row['perplexity'] / result['models'][0]['perplexity']:.3f}",
            f"{row['weight_bytes'] / 1e6:.0f}",
            str(row["tokens"]),
            f"{row['seconds']:.1f}",
        )
    return table


def _load(name: str, dtype: str | None, device: str | None) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    if name == "smollm2":
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, tokenizer = load_smollm2(getattr(torch, dtype or "float32"))
        return model.to(where), tokenizer
    model = hf_paged.load(name, dtype=dtype, device=device)
    return model, AutoTokenizer.from_pretrained(name)
