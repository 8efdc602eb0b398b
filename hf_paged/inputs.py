"""Prompts as dicts, in vLLM's words."""

from __future__ import annotations

from typing import TypedDict


class TextPrompt(TypedDict):
    """`{"prompt": text}`."""

    prompt: str


class TokensPrompt(TypedDict):
    """`{"prompt_token_ids": ids}`."""

    prompt_token_ids: list[int]
