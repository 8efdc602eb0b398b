"""Chats become prompts: messages through a tokenizer's chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hf_paged.text_file import read_text

Message = Mapping[str, Any]
"""A dict with a role and content, in OpenAI's words."""


def render_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, str]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[str, list[int]]:
    """A chat as (text, token ids).

    Args:
        chat_template: a Jinja template; None is the tokenizer's own.
        add_generation_prompt: end with what begins an assistant's turn.
        continue_final_message: leave the last message open, to be continued.
        tools, documents: for templates that show them to the model.
        chat_template_kwargs: what else a template asks for, such as `enable_thinking`.

    Raises:
        ValueError: messages that make no chat, parts that are not text, or a template that cannot be rendered.
    """
    if not messages:
        raise ValueError("a chat needs at least one message")
    if add_generation_prompt and continue_final_message:
        raise ValueError("continue_final_message leaves the last message open: set add_generation_prompt=False with it")
    chat_template = chat_template or getattr(tokenizer, "chat_template", None)
    if not chat_template:
        raise ValueError("the tokenizer has no chat template: give one, or the prompt as text or token ids")
    plain = [_plain(message) for message in messages]
    options = dict(chat_template_kwargs or {})
    for name in ("tokenize", "return_dict", "return_tensors"):
        if name in options:
            raise ValueError(f"chat_template_kwargs: {name} is not the template's")
    import jinja2

    try:
        text = tokenizer.apply_chat_template(
            plain,
            tokenize=False,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=list(tools) if tools else None,
            documents=list(documents) if documents else None,
            **options,
        )
    except (jinja2.TemplateError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"the chat template cannot be rendered with these messages: {error}") from error
    return text, list(tokenizer(text, add_special_tokens=False)["input_ids"])


def load_chat_template(given: str | Path | None) -> str | None:
    """A chat template that was given as such or as a file's path.

    Raises:
        ValueError: neither a file nor a Jinja template, or a file that cannot be read.
    """
    if given is None:
        return None
    text = str(given)
    if "{" in text or "\n" in text:
        return text
    if not Path(text).is_file():
        raise ValueError(f"chat_template must be a Jinja template or the path of one, got {text!r}")
    return read_text(Path(text), "chat template")


def _plain(message: Message) -> dict[str, Any]:
    """A message whose content is text: parts are joined, and the arguments of earlier tool calls are objects, as
    templates expect them; what is no JSON stays as it is."""
    if not isinstance(message, Mapping) or "role" not in message:
        got = f"keys {sorted(map(str, message))}" if isinstance(message, Mapping) else repr(message)[:80]
        raise ValueError(f'a chat message needs a "role", got {got}')
    plain = dict(message)
    content = plain.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        plain["content"] = "\n".join(_text_of(part) for part in content)
    elif content is None:
        plain["content"] = ""
    elif not isinstance(content, str):
        raise ValueError(f"a message's content must be text or a list of parts, got {type(content).__name__}")
    if plain.get("tool_calls"):
        plain["tool_calls"] = [_with_parsed_arguments(call) for call in plain["tool_calls"]]
    return plain


def _text_of(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise ValueError(f"a message's content holds a part of type {kind!r}: only text is served")


def _with_parsed_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError('a tool call in a message needs a "function" with a name and arguments')
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        # A model's malformed arguments come back with what a tool said of them: it should see what it wrote.
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    return {**call, "function": {**function, "arguments": arguments}}
