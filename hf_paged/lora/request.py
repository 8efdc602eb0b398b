"""LoRARequest: which adapter a request wants, in vLLM's words."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any


@dataclass(frozen=True)
class LoRARequest:
    """Names an adapter.

    Args:
        lora_name: for people; outputs and the server show it.
        lora_int_id: at least 1. Within an engine it stands for one name and path until the adapter is removed.
        lora_path: a folder that PEFT's `save_pretrained` wrote, or the name of such a repository on the hub.
        base_model_name: of the model it was trained on, for the server's list of models.
        load_inplace: read the files anew, though an adapter of this id is loaded. Requests under way go on with the
            one that they began with.

    Raises:
        TypeError, ValueError: a field that makes no sense.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.lora_path, PathLike):
            object.__setattr__(self, "lora_path", str(self.lora_path))
        if not isinstance(self.lora_name, str) or not isinstance(self.lora_path, str):
            raise TypeError(
                f"lora_name and lora_path must be strings, got {self.lora_name!r:.80} and {self.lora_path!r:.80}"
            )
        if isinstance(self.lora_int_id, bool) or not isinstance(self.lora_int_id, int) or self.lora_int_id < 1:
            raise ValueError(f"lora_int_id must be an integer of at least 1, got {self.lora_int_id!r:.80}")
        if not self.lora_name or not self.lora_path:
            raise ValueError("a LoRARequest needs a lora_name and a lora_path: the adapter's folder")

    @property
    def name(self) -> str:
        return self.lora_name

    @property
    def adapter_id(self) -> int:
        return self.lora_int_id

    @property
    def path(self) -> str:
        return self.lora_path


def one_each(lora_request: Any, count: int) -> list[LoRARequest | None]:
    """One adapter for all of so many prompts, or a list with one, or None, per prompt, as such a list.

    Raises:
        TypeError: something else than a LoRARequest.
        ValueError: a list of another length.
    """
    each = list(lora_request) if isinstance(lora_request, list | tuple) else [lora_request] * count
    for one in each:
        if one is not None and not isinstance(one, LoRARequest):
            raise TypeError(
                f"lora_request must be a hf_paged.LoRARequest, or a list with one or None per prompt, got {one!r:.80}"
            )
    if len(each) != count:
        raise ValueError(f"lora_request has {len(each)} entries for {count} prompts: give one, or one per prompt")
    return each
