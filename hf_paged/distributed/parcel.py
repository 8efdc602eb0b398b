"""Requests and outputs on their way from one process to another."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace

from hf_paged.engine.intake import Intake
from hf_paged.engine.request import Request
from hf_paged.lora.travel import AdapterReceiver
from hf_paged.outputs import CompletionLogprobs, CompletionOutput, RequestOutput


def pack_request(request: Request) -> bytes:
    """A request that nobody has begun with; its adapter travels by itself.

    Raises:
        ValueError: it has something with it that cannot travel.
    """
    form, request.form = request.form, None  # compiled grammars cannot be pickled
    try:
        return pickle.dumps(request)
    except Exception as error:
        raise ValueError(
            "a request's processors and criteria go to another process and must be picklable: functions and classes of "
            f"a module, no lambdas ({error})"
        ) from error
    finally:
        request.form = form


def unpack_request(parcel: bytes, intake: Intake, adapters: AdapterReceiver) -> Request:
    """It again, where it is computed.

    Args:
        intake: of the engine that computes it.
        adapters: which has its own.
    """
    request: Request = pickle.loads(parcel)
    adapters.restore(request)
    if request.sampling.structured_outputs is not None:
        request.form = intake.compile_form(request.sampling.structured_outputs, request.stop_token_ids)
    return request


def pack_output(output: RequestOutput) -> RequestOutput:
    """An output without what its reader has already, the prompt, or would have to be sent a tokenizer for."""
    return replace(
        output,
        prompt=None,
        prompt_token_ids=[],
        outputs=[_decoded_by(None, completion) for completion in output.outputs],
        error=output.error and picklable(output.error),
    )


def unpack_output(output: RequestOutput, request: Request, decode: Callable[[list[int]], str] | None) -> RequestOutput:
    """It again, where it is read.

    Args:
        request: what it is an output of.
        decode: gives tokens their texts.
    """
    decode = decode if request.sampling.detokenize else None
    return replace(
        output,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        outputs=[_decoded_by(decode, completion) for completion in output.outputs],
    )


def ended(request: Request, reason: str, error: Exception | None = None) -> RequestOutput:
    """The last output of a request of which nothing, or nothing more, is known."""
    outputs = [CompletionOutput(index, "", [], None, None, finish_reason=reason) for index in range(request.asked.n)]
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        prompt_logprobs=None,
        outputs=outputs,
        finished=True,
        metrics=request.metrics,
        error=error,
    )


def picklable(error: Exception) -> Exception:
    """An error as another process can read it: itself, or one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))  # those with arguments of their own often fail here
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _decoded_by(decode: Callable[[list[int]], str] | None, completion: CompletionOutput) -> CompletionOutput:
    if not isinstance(completion.logprobs, CompletionLogprobs):
        return completion
    return replace(completion, logprobs=completion.logprobs.decoded_by(decode))
