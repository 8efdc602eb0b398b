"""LLM: load a model and generate with it, in the shape that vLLM's users know."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_paged import many
from hf_paged.chat import load_chat_template, render_chat
from hf_paged.distributed.replicated import ReplicatedEngine
from hf_paged.distributed.spread import generate_spread
from hf_paged.engine.engine import Engine
from hf_paged.engine.intake import Prompt
from hf_paged.engine.request import Request
from hf_paged.llm.arguments import EngineArgs
from hf_paged.llm.beam_search import BeamSearchOutput, beam_search
from hf_paged.llm.replicas import ReplicatedModel
from hf_paged.llm.worker import call_with_model, call_worker, make_worker
from hf_paged.model.introspect import causal_lm
from hf_paged.outputs import RequestOutput
from hf_paged.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model with a tokenizer and an engine, for offline inference. Any number of threads may call it at once.

    Args:
        model: a folder or the name of a checkpoint, a GGUF file, or a transformers model, which is wrapped in place.
        worker_extension_cls: a class, or its dotted name, whose methods `collective_rpc` can call.
        profiler_config: `{"torch_profiler_dir": folder}`, where `stop_profile` writes.
        options: vLLM's arguments (`EngineArgs` documents them) and fields of `EngineConfig`. Those that have nothing to
            set here are accepted, with a line in the log.

    Raises:
        TypeError: an option that nobody knows; the message suggests the nearest one.
        ValueError: a value that makes no sense, or something that cannot be had.
        FileNotFoundError: no such checkpoint.
        UnsupportedModelError: the model cannot be paged.
    """

    def __init__(
        self,
        model: Any,
        *,
        worker_extension_cls: type | str | None = None,
        profiler_config: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.args = EngineArgs.parse(model, options)
        self._chat_template = load_chat_template(self.args.chat_template)
        self.model, self._ranks = self.args.load(worker_extension_cls)
        """The transformers model, wrapped; with `data_parallel_size` what stands for its replicas."""
        self.engine  # noqa: B018 - made now: what is wrong with it should be said here
        self._worker = None if self._replicated else make_worker(self.model, worker_extension_cls)
        self._queued: list[Request] = []
        self._queue_lock = threading.Lock()
        self._profile_folder = Path((profiler_config or {}).get("torch_profiler_dir", "hf_paged_profile"))
        self._profile: Any = None

    @property
    def engine(self) -> Engine | ReplicatedEngine:
        return self.model.engine

    @property
    def _replicated(self) -> bool:
        return isinstance(self.model, ReplicatedModel)

    @property
    def llm_engine(self) -> Engine | ReplicatedEngine:
        """vLLM's name for it."""
        return self.engine

    # ---- generating ----------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: Params = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: many.Lora = None,
        priority: Sequence[int] | None = None,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    ) -> list[RequestOutput]:
        """Continues prompts, all in one batch.

        Args:
            prompts: text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`; one, or a list of them.
            sampling_params: one for all, or a list with one per prompt; None is `get_default_sampling_params()`.
            use_tqdm: show a progress bar.
            lora_request: an adapter for all, or a list with one, or None, per prompt; needs `enable_lora=True`.
            priority: one per prompt; lower runs earlier.
            prompt_token_ids: the older way to give token ids.

        Returns:
            one output per prompt, in their order.

        Raises:
            ValueError, TypeError, FileNotFoundError: a bad prompt, parameter or adapter, before any work starts.
        """
        requests = self._requests(_given(prompts, prompt_token_ids), sampling_params, lora_request, priority)
        return self._run(requests, bool(use_tqdm))

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: Params = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: many.Lora = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one chat (a list of messages) or several (a list of such lists).

        Args:
            chat_template: a Jinja template or the path of one, instead of the model's.
            chat_template_content_format: accepted as vLLM has it; content reaches the template as text.
            continue_final_message: go on with the last message instead of answering it; then
                `add_generation_prompt` must be False.
            tools: as in OpenAI's API, for templates that show them to the model.
            chat_template_kwargs: what else the template asks for.

        Returns, raises: as `generate`.
        """
        if chat_template_content_format not in ("auto", "string", "openai"):
            raise ValueError(
                f'chat_template_content_format must be "auto" or "string", got {chat_template_content_format!r}'
            )
        if not messages:
            raise ValueError("chat() needs at least one message")
        chats = [messages] if isinstance(messages[0], dict) else list(messages)
        template = load_chat_template(chat_template) or self._chat_template
        prompts: list[Prompt] = []
        for place, chat in enumerate(chats):
            try:
                text, ids = render_chat(
                    self.engine.intake.need_tokenizer("a chat"),
                    chat,
                    chat_template=template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tools=tools,
                    chat_template_kwargs=chat_template_kwargs,
                )
            except ValueError as error:
                raise ValueError(f"chat {place}: {error}") from error
            prompts.append({"prompt": text, "prompt_token_ids": ids})
        return self.generate(prompts, sampling_params, use_tqdm, lora_request)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        lora_request: many.Lora = None,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations, by transformers' own beam search: one prompt after the other, without paging.

        Raises:
            ValueError, TypeError: a bad prompt or parameter, before any work starts.
        """
        if any(one is not None for one in (lora_request if isinstance(lora_request, list) else [lora_request])):
            raise ValueError(
                "beam_search runs through transformers' own loop, which has no adapters by request: leave lora_request "
                "out, or use a model that the adapter is merged into"
            )
        self._need_model("beam_search()")
        return beam_search(causal_lm(self.model), self.engine.intake, _given(prompts, None), params)

    def enqueue(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: many.Lora = None,
        priority: Sequence[int] | None = None,
    ) -> list[str]:
        """Takes prompts as `generate` does, for `wait_for_completion`. Returns their requests' ids."""
        requests = self._requests(_given(prompts, None), sampling_params, lora_request, priority)
        with self._queue_lock:
            self._queued += requests
        return [request.request_id for request in requests]

    def wait_for_completion(self, use_tqdm: bool | Callable[..., Any] = True) -> list[RequestOutput]:
        """The outputs of what was enqueued, in that order."""
        with self._queue_lock:
            requests, self._queued = self._queued, []
        return self._run(requests, bool(use_tqdm))

    def _run(self, requests: list[Request], progress: bool) -> list[RequestOutput]:
        if isinstance(self.engine, Engine) and self.args.data_parallel_size > 1:  # under torchrun
            return generate_spread(self.model, self.engine, requests, progress)
        return many.generate_many(self.engine, requests, progress)

    def _requests(
        self, prompts: Sequence[Prompt], params: Params, lora_request: many.Lora, priority: Sequence[int] | None
    ) -> list[Request]:
        given = params if params is not None else self.get_default_sampling_params()
        if priority is not None:
            each = list(given) if isinstance(given, Sequence) else [given] * len(prompts)
            if len(priority) != len(prompts) or len(each) != len(prompts):
                raise ValueError(f"{len(priority)} priorities for {len(prompts)} prompts: give one per prompt")
            given = [one.clone(priority=value) for one, value in zip(each, priority, strict=True)]
        lm = causal_lm(self.model)
        return many.make_requests(self.engine, lm, prompts, given, RequestOutputKind.FINAL_ONLY, lora_request)

    # ---- what it is ----------------------------------------------------------------------------------------

    def get_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            ValueError: there is none.
        """
        return self.engine.intake.need_tokenizer("get_tokenizer()")

    def set_tokenizer(self, tokenizer: Any) -> None:
        """Another tokenizer, for requests from here on."""
        if not self._replicated:
            self.model._state().tokenizer = tokenizer
        self.engine.set_tokenizer(tokenizer)

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation config says about sampling (unless `generation_config="vllm"`), and
        `SamplingParams`' defaults for the rest."""
        return SamplingParams(**sampling_defaults(self.model, self.args))

    # ---- weights, memory, profiles -------------------------------------------------------------------------

    def shutdown(self) -> None:
        """Gives the page pool's memory back and, where the model is spread over processes, ends them. It is of no use
        after it. A program's end does the same."""
        if self._ranks is not None:
            self._ranks.stop()
        else:
            self.model._state().drop_engine()

    def sleep(self, level: int = 1) -> None:
        """Gives the page pool's memory back; see `Engine.sleep`.

        Raises:
            ValueError: another level: the weights are the model's and stay where they are.
            RuntimeError: requests are unfinished.
        """
        self.engine.sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Takes the memory again, if `tags` is None or names "kv_cache"; "weights" never left."""
        for tag in tags or ():
            if tag not in ("weights", "kv_cache"):
                raise ValueError(f'wake_up tags are "weights" and "kv_cache", got {tag!r}')
        if tags is None or "kv_cache" in tags:
            self.engine.wake_up()

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached pages."""
        self.engine.reset_prefix_cache()
        return True

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Calls a method of the worker (see `worker_extension_cls`), or a function with it for its first argument.
        There is one worker, in this process, so the list has one result; with `data_parallel_size` there is one per
        replica. What goes there and comes from there must then be picklable.

        Raises:
            AttributeError: no such method.
            TimeoutError: replicas have not answered within `timeout` seconds.
        """
        work = functools.partial(call_worker, method, args, kwargs or {})
        if isinstance(self.engine, ReplicatedEngine):
            return [answer for _, answer in self.engine.call(work, timeout)]
        return [work(self._worker)]

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        """`[func(model)]`, with `data_parallel_size` one result per replica. Weights that it changes are noticed."""
        if isinstance(self.engine, ReplicatedEngine):
            return [answer for _, answer in self.engine.call(functools.partial(call_with_model, func))]
        return [func(self.model)]

    def start_profile(self) -> None:
        """Begins a trace with torch's profiler.

        Raises:
            RuntimeError: one is under way.
            ValueError: the model is not in this process.
        """
        self._need_model("start_profile()")
        if self._profile is not None:
            raise RuntimeError("a profile is being taken already: call stop_profile() first")
        import torch.profiler

        self._profile = torch.profiler.profile()
        self._profile.start()

    def stop_profile(self) -> Path:
        """Ends the trace. Returns the file that it was written to, for chrome://tracing or Perfetto.

        Raises:
            RuntimeError: none was begun.
        """
        profile, self._profile = self._profile, None
        if profile is None:
            raise RuntimeError("no profile is being taken: call start_profile() first")
        profile.stop()
        self._profile_folder.mkdir(parents=True, exist_ok=True)
        number = sum(1 for _ in self._profile_folder.glob("trace-*.json"))
        file = self._profile_folder / f"trace-{number}.json"
        profile.export_chrome_trace(str(file))
        return file

    def _need_model(self, what: str) -> None:
        if self._replicated:
            raise ValueError(
                f"{what} needs the model in this process, and with data_parallel_size="
                f"{self.args.data_parallel_size} it is in those of its replicas: leave data_parallel_size out"
            )

    # ---- what it does not do -------------------------------------------------------------------------------

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Not served: pages are for generation."""
        raise _not_generation("encode")

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """Not served: pages are for generation."""
        raise _not_generation("embed")

    def classify(self, *args: Any, **kwargs: Any) -> Any:
        """Not served: pages are for generation."""
        raise _not_generation("classify")

    def reward(self, *args: Any, **kwargs: Any) -> Any:
        """Not served: pages are for generation."""
        raise _not_generation("reward")

    def score(self, *args: Any, **kwargs: Any) -> Any:
        """Not served: vLLM's `score` compares texts by a cross-encoder. `llm.model.score` gives log-probabilities of
        completions."""
        raise _not_generation("score", " For log-probabilities of given completions call llm.model.score(...).")


SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_defaults(model: Any, args: EngineArgs) -> dict[str, Any]:
    """What a model's generation config says about sampling, as fields of SamplingParams."""
    config = getattr(causal_lm(model), "generation_config", None)
    if config is None or args.generation_config == "vllm":
        return {}
    given = {name: getattr(config, name, None) for name in SAMPLING_DEFAULTS}
    given["max_tokens"] = getattr(config, "max_new_tokens", None)
    return {name: value for name, value in given.items() if value is not None}


def _given(prompts: Any, prompt_token_ids: Any) -> list[Prompt]:
    if (prompts is None) == (prompt_token_ids is None):
        raise ValueError("give prompts" + ("" if prompts is None else ", or prompt_token_ids, not both"))
    prompts = prompt_token_ids if prompts is None else prompts
    if isinstance(prompts, str | dict):
        return [prompts]
    prompts = list(prompts)
    if prompts and all(isinstance(prompt, int) for prompt in prompts):
        return [prompts]
    if prompts and all(isinstance(prompt, dict) and "role" in prompt for prompt in prompts):
        raise TypeError("a list of messages is a chat: call chat() for it")
    return prompts


def _not_generation(name: str, instead: str = "") -> NotImplementedError:
    return NotImplementedError(f"LLM.{name}() is not served: the engine generates text.{instead}")
