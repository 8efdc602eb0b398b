"""Who answers `hf-paged chat` and `hf-paged complete`: a server, or a model in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

Message = dict[str, str]


class AnswerError(Exception):
    """There is no answer; the message says why and what to do."""


@dataclass(frozen=True)
class Piece:
    """What is new of an answer."""

    text: str
    tokens: int
    """Generated tokens that this stands for; a server tells their number with its last piece alone."""
    reasoning: str = ""
    """What the model thinks before it answers, where a server tells the two apart."""


class Answering(Protocol):
    """Answers, piece by piece. `sampling` holds OpenAI's fields: temperature, top_p, max_tokens, seed. Closing the
    iterator stops the answer.

    Raises:
        AnswerError: while iterating.
    """

    name: str

    def chat(self, messages: list[Message], sampling: dict[str, Any]) -> Iterator[Piece]: ...

    def complete(self, prompt: str, sampling: dict[str, Any]) -> Iterator[Piece]: ...

    def close(self) -> None: ...


class Server:
    """A server with OpenAI's API.

    Args:
        url: up to and with /v1, which is added where it has no path.
        name: the model to ask for; None is the first that the server lists.

    Raises:
        ImportError: httpx is not installed; the message names the extra.
        AnswerError: nobody answers at the URL, or it lists no model.
    """

    def __init__(self, url: str, name: str | None = None, api_key: str | None = None) -> None:
        try:
            import httpx
        except ImportError as error:
            raise ImportError("asking a server needs httpx: pip install 'hf_paged[server]'") from error
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise AnswerError(f"a URL begins with http:// or https://, such as http://localhost:8000/v1; got {url!r}")
        self._url = url.rstrip("/") + ("" if urlsplit(url).path.strip("/") else "/v1")
        self._errors = httpx.HTTPError
        # A long prompt may take any time until its first token; what does not even connect will not come.
        patience = httpx.Timeout(None, connect=10.0)
        self._client = httpx.Client(timeout=patience, headers={"Authorization": f"Bearer {api_key or 'EMPTY'}"})
        try:
            self.name = name or self._first_model()
        except BaseException:
            self.close()
            raise

    def chat(self, messages: list[Message], sampling: dict[str, Any]) -> Iterator[Piece]:
        for choice, tokens in self._stream("/chat/completions", {"messages": messages} | sampling):
            delta = choice.get("delta") or {}
            reasoning = delta.get("reasoning") or delta.get("reasoning_content") or ""
            yield Piece(delta.get("content") or "", tokens, reasoning)

    def complete(self, prompt: str, sampling: dict[str, Any]) -> Iterator[Piece]:
        for choice, tokens in self._stream("/completions", {"prompt": prompt} | sampling):
            yield Piece(choice.get("text") or "", tokens)

    def close(self) -> None:
        self._client.close()

    def _first_model(self) -> str:
        try:
            response = self._client.get(self._url + "/models")
            if response.is_error:
                raise AnswerError(self._said(response.status_code, response.text))
            models = response.json()["data"]
            return str(models[0]["id"])
        except self._errors as error:
            raise self._nobody(error) from error
        except (ValueError, LookupError, TypeError) as error:
            raise AnswerError(f"{self._url}/models lists no model: give --model-name, or another --url") from error

    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[tuple[dict[str, Any], int]]:
        """(first choice, tokens) of each event; the last one has the tokens alone."""
        body = body | {"model": self.name, "stream": True, "stream_options": {"include_usage": True}}
        try:
            with self._client.stream("POST", self._url + path, json=body) as response:
                if response.is_error:
                    raise AnswerError(self._said(response.status_code, response.read().decode("utf-8", "replace")))
                for line in response.iter_lines():
                    data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                    if data == "[DONE]":
                        return
                    if data:
                        yield self._event(data)
        except self._errors as error:
            raise self._nobody(error) from error

    def _event(self, data: str) -> tuple[dict[str, Any], int]:
        try:
            event = json.loads(data)
            if "error" in event:
                raise AnswerError(_message(event) or data)
            choices, usage = event.get("choices") or [{}], event.get("usage") or {}
            return choices[0], int(usage.get("completion_tokens") or 0)
        except (ValueError, AttributeError, TypeError) as error:
            raise AnswerError(f"the server sent what is no event of OpenAI's: {data[:200]!r}") from error

    def _said(self, status: int, text: str) -> str:
        try:
            said = _message(json.loads(text))
        except ValueError:
            said = None
        hint = ": give the server's key with --api-key" if status == 401 else ""
        return f"{self._url} answers {status}: {said or text[:200] or 'nothing else'}{hint}"

    def _nobody(self, error: Exception) -> AnswerError:
        return AnswerError(
            f"no answer from {self._url} ({error or type(error).__name__}): start a server with hf-paged serve MODEL, "
            "give another --url, or run a model in this process with --model"
        )


def _message(body: Any) -> str | None:
    """What OpenAI's errors say, and FastAPI's."""
    error = body.get("error", body) if isinstance(body, dict) else None
    found = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return None if found is None else str(found)


class Local:
    """A model in this process.

    Args:
        model: smollm2, a folder, a GGUF file or a name on the hub.
        options: of the model and its engine, as `hf_paged.EngineArgs` takes them.

    Raises:
        FileNotFoundError, ValueError, TypeError, ImportError: as `EngineArgs.parse` and `EngineArgs.load`.
    """

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        from hf_paged.bench.models import checkpoint
        from hf_paged.llm.arguments import EngineArgs
        from hf_paged.llm.llm import sampling_defaults

        self.name = model
        args = EngineArgs.parse(checkpoint(model), options)
        self._model, self._ranks = args.load()
        self._defaults = sampling_defaults(self._model, args)
        self._model.engine  # noqa: B018 - made now, so that what cannot work is said before anything is asked

    def chat(self, messages: list[Message], sampling: dict[str, Any]) -> Iterator[Piece]:
        return self._stream(messages, {"max_tokens": None} | self._defaults | sampling)

    def complete(self, prompt: str, sampling: dict[str, Any]) -> Iterator[Piece]:
        return self._stream(prompt, self._defaults | sampling)

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks.stop()

    def _stream(self, prompt: Any, sampling: dict[str, Any]) -> Iterator[Piece]:
        from hf_paged.sampling_params import RequestOutputKind, SamplingParams

        engine = self._model.engine
        try:
            engine.intake.need_tokenizer("text")
            params = SamplingParams(**sampling, output_kind=RequestOutputKind.DELTA)
            request = engine.intake.request(prompt, params)
            engine.check(request)
        except (ValueError, TypeError) as error:
            raise AnswerError(str(error)) from error
        with closing(engine.run([request])) as running:
            for output in running:
                if output.error is not None:
                    raise AnswerError(f"{type(output.error).__name__}: {output.error}")
                for sample in output.outputs:
                    yield Piece(sample.text, len(sample.token_ids))
