"""StructuredOutputsParams: what form a completion must have."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass
class StructuredOutputsParams:
    """The form of a completion: exactly one of `KINDS`. Names are vLLM's.

    Raises:
        ValueError, TypeError: none or several forms, or one of the wrong type. What is in a schema, expression or
            grammar is checked when a request is made, before any work starts.
    """

    json: str | dict[str, Any] | Any | None = None
    """A JSON schema, as text or a dict, or a pydantic model. Objects have the properties that it names and no others,
    and anything where it names none."""
    regex: str | None = None
    choice: list[str] | None = None
    """One of these texts."""
    grammar: str | None = None
    """EBNF in the notation of GBNF; the rule `root` is the start."""
    json_object: bool | None = None
    """Any JSON object."""
    structural_tag: str | dict[str, Any] | None = None
    """Free text with parts of given forms in it, as xgrammar describes it."""
    disable_any_whitespace: bool = False
    """JSON without spaces and line breaks."""
    disable_additional_properties: bool = False
    """Nothing to switch: where a schema names properties there are no others."""
    whitespace_pattern: str | None = None
    """Not served; use `disable_any_whitespace`."""
    disable_fallback: bool = False

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(
                f"structured outputs need exactly one of {', '.join(KINDS)}; got {', '.join(given) or 'none'}"
            )
        if self.whitespace_pattern is not None:
            raise ValueError("whitespace_pattern is not served: disable_any_whitespace=True leaves all of it out")
        kind, value = given[0], getattr(self, given[0])
        if kind in ("regex", "grammar") and not isinstance(value, str):
            raise TypeError(f"structured outputs: {kind} must be text, got {type(value).__name__}")
        if kind == "choice":
            if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value) or not value:
                raise TypeError(f"structured outputs: choice must be a list of texts, got {value!r:.80}")
            if "" in value:
                raise ValueError("structured outputs: a choice must not be empty")
        if kind == "json_object" and value is not True:
            raise TypeError(f"structured outputs: json_object must be True, got {value!r:.80}")
        if kind in ("json", "structural_tag") and not isinstance(value, str | dict):
            schema = getattr(value, "model_json_schema", None)
            if kind != "json" or not callable(schema):
                raise TypeError(f"structured outputs: {kind} must be a dict or text, got {type(value).__name__}")
            self.json = schema()

    @property
    def kind(self) -> str:
        """The one of `KINDS` that was given."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False))

    def key(self) -> str:
        """The same for equal forms: what compiled grammars are kept by.

        Raises:
            ValueError: a schema that is no JSON.
        """
        try:
            return json.dumps({f.name: getattr(self, f.name) for f in fields(self)})
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"structured outputs: {self.kind} is no JSON: {error}") from error


def GuidedDecodingParams(**options: Any) -> StructuredOutputsParams:
    """vLLM's older name of `StructuredOutputsParams`; `backend` is accepted and of no consequence."""
    options.pop("backend", None)
    known = {f.name for f in fields(StructuredOutputsParams)}
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"GuidedDecodingParams has no option {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return StructuredOutputsParams(**options)
