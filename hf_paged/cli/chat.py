"""`hf-paged chat` and `hf-paged complete`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from typing import Annotated, Any

import typer

from hf_paged.cli.answering import AnswerError, Answering, Local, Server
from hf_paged.cli.arguments import key_values
from hf_paged.cli.conversation import converse, keep_completing, tell
from hf_paged.cli.terminal import friendly, notes

DEFAULT_URL = "http://localhost:8000/v1"

Url = Annotated[
    str | None, typer.Option(help=f"Of a server with OpenAI's API. Default: {DEFAULT_URL}.", show_default=False)
]
ModelName = Annotated[
    str | None, typer.Option(help="The server's model to ask. Default: the first that it lists.", show_default=False)
]
ApiKey = Annotated[
    str | None,
    typer.Option(help="The server's key.", envvar=["HF_PAGED_API_KEY", "OPENAI_API_KEY"], show_envvar=True),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="Run this model in the process, without a server: smollm2, a folder, a GGUF file or a name on the hub.",
        autocompletion=lambda: ["smollm2"],
    ),
]
ModelOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        help="With --model: an option that `hf-paged serve` has for models, as key=value (dtype=bfloat16, "
        "max_model_len=4096); may be given several times.",
    ),
]
Temperature = Annotated[float | None, typer.Option(min=0.0, help="0 is greedy. Default: the model's or server's.")]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Draw among the likeliest that make up this much.")]
Seed = Annotated[int | None, typer.Option(help="Makes what is drawn repeatable.")]
Stats = Annotated[bool, typer.Option("--stats", help="Say how long each answer took: first token, tokens per second.")]


def chat(
    url: Url = None,
    model_name: ModelName = None,
    api_key: ApiKey = None,
    model: Model = None,
    option: ModelOptions = None,
    system_prompt: Annotated[str | None, typer.Option(help="Comes before the conversation.")] = None,
    quick: Annotated[
        str | None, typer.Option("--quick", "-q", metavar="MESSAGE", help="Ask this alone, print the answer, and end.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens per answer at most. Default: as many as fit.")
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stats: Stats = False,
) -> None:
    """Chat with a server's model, or with one in this process.

    At a terminal: a conversation. Through a pipe: standard input is one message, and the answer alone is printed.

    \b
    hf-paged chat                             a server at localhost:8000
    hf-paged chat --model smollm2             no server: a small model here
    hf-paged chat -q "Name three colours."    one question, one answer
    hf-paged chat < letter.txt > answer.txt   through pipes
    """
    sampling = _given(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)

    def run(answering: Answering) -> None:
        def once(message: str) -> bool:
            opening = [{"role": "system", "content": system_prompt}] if system_prompt else []
            messages = [*opening, {"role": "user", "content": message}]
            return tell(answering.chat(messages, sampling), stats=stats).stopped

        _ask(once, quick, lambda: converse(lambda said: answering.chat(said, sampling), system_prompt, stats=stats))

    _with_answering(url, model_name, api_key, model, option, run)


def complete(
    url: Url = None,
    model_name: ModelName = None,
    api_key: ApiKey = None,
    model: Model = None,
    option: ModelOptions = None,
    quick: Annotated[
        str | None, typer.Option("--quick", "-q", metavar="PROMPT", help="Continue this alone, and end.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens per completion at most. Default: OpenAI's, which is 16.")
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stats: Stats = False,
) -> None:
    """Continue a text, by a server's model or by one in this process; no chat template.

    At a terminal: one prompt after the other. Through a pipe: standard input is the prompt, and what follows it is
    printed.

    \b
    hf-paged complete --model smollm2 -q "Once upon a" --max-tokens 99
    hf-paged complete --url http://gpu-box:8000/v1 < book.txt > rest.txt
    """
    sampling = _given(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)

    def run(answering: Answering) -> None:
        def once(prompt: str) -> bool:
            return tell(answering.complete(prompt, sampling), stats=stats).stopped

        _ask(once, quick, lambda: keep_completing(lambda said: answering.complete(said, sampling), stats=stats))

    _with_answering(url, model_name, api_key, model, option, run)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _with_answering(
    url: str | None,
    model_name: str | None,
    api_key: str | None,
    model: str | None,
    option: list[str] | None,
    run: Callable[[Answering], None],
) -> None:
    if model is not None and (url is not None or model_name is not None):
        raise typer.BadParameter(
            "--model runs a model in this process, --url and --model-name ask a server for one of its own: give one "
            "or the other"
        )
    if option and model is None:
        raise typer.BadParameter("--option is for a model in this process: give --model with it")
    options = key_values(option or [])

    def start() -> None:
        answering: Answering
        if model is None:
            answering = Server(url or DEFAULT_URL, model_name, api_key)
        else:
            notes.print(f"loading {model} ...", style="dim", markup=False)
            answering = Local(model, options)
        with closing(answering):
            if sys.stdin.isatty():
                notes.print(f"model: {answering.name}", style="dim", markup=False)
            run(answering)

    friendly(start, AnswerError, ValueError, TypeError)


def _ask(once: Callable[[str], bool], quick: str | None, at_terminal: Callable[[], None]) -> None:
    """What is asked on the command line, else what comes through a pipe, else whoever sits there."""
    if quick is None and sys.stdin.isatty():
        at_terminal()
        return
    asked = sys.stdin.read() if quick is None else quick
    if not asked.strip():
        raise typer.BadParameter("there is nothing to answer: give --quick, or something on standard input")
    if once(asked):
        raise typer.Exit(130)
