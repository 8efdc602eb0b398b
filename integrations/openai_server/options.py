"""Options of `hf-paged serve`: of the server, and of the model it serves; from the command line and from YAML."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_paged.bench.models import checkpoint
from hf_paged.chat import load_chat_template
from hf_paged.config import EngineConfig
from hf_paged.integrations.openai_server.reasoning import REASONING_PARSERS
from hf_paged.integrations.openai_server.tools import TOOL_PARSERS
from hf_paged.llm.arguments import PLAIN, EngineArgs
from hf_paged.lora.request import LoRARequest
from hf_paged.observe.spans import require_opentelemetry
from hf_paged.text_file import read_text


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ServerOptions:
    """How to serve; on the command line with dashes.

    Raises:
        ValueError: a value makes no sense.
        ImportError: it needs an extra; the message names it.
    """

    host: str = _option("127.0.0.1", "address to listen at; 0.0.0.0 is every one the machine has")
    port: int = _option(8000, "port to listen at; 0 is any free one")
    uds: str | None = _option(None, "path of a Unix socket to listen at instead")
    api_key: list[str] = field(
        default_factory=list, metadata={"help": "keys that clients must have one of (HF_PAGED_API_KEY is one too)"}
    )
    served_model_name: list[str] = field(
        default_factory=list, metadata={"help": "names that clients may use for the model; the first is reported"}
    )
    chat_template: str | None = _option(None, "a Jinja template or a file of one, instead of the tokenizer's")
    enable_auto_tool_choice: bool = _option(False, "let the model call tools by itself")
    tool_call_parser: str | None = _option(None, f"how it writes calls: {', '.join(TOOL_PARSERS)}")
    reasoning_parser: str | None = _option(None, f"how it writes its reasoning: {', '.join(REASONING_PARSERS)}")
    lora_modules: list[str] = field(
        default_factory=list,
        metadata={"help": 'adapters that clients may name as the model: NAME=PATH, or {"name": ..., "path": ...}'},
    )
    allow_runtime_lora: bool = _option(False, "let clients load and unload adapters: of any folder the server can read")
    root_path: str = _option("", "where a proxy has put the server")
    allowed_origins: list[str] = field(default_factory=lambda: ["*"], metadata={"help": "CORS: origins"})
    allowed_methods: list[str] = field(default_factory=lambda: ["*"], metadata={"help": "CORS: methods"})
    allowed_headers: list[str] = field(default_factory=lambda: ["*"], metadata={"help": "CORS: headers"})
    allow_credentials: bool = _option(False, "CORS: credentials")
    ssl_keyfile: str | None = _option(None, "TLS: the key")
    ssl_certfile: str | None = _option(None, "TLS: the certificate")
    ssl_ca_certs: str | None = _option(None, "TLS: certificates that clients' are checked with")
    max_request_bytes: int = _option(16 << 20, "larger bodies are answered with 413")
    request_timeout_s: int = _option(60, "how long a request's headers, and then its body, may take to arrive")
    max_queued_requests: int = _option(2048, "requests that may wait beside max_num_seqs; more are answered with 429")
    max_logprobs: int = _option(20, "log-probabilities per token that clients may ask for; -1 is any number")
    metrics_prefix: str = _option("hf_paged", 'prefix of the metrics: "vllm" suits dashboards made for it')
    disable_live_page: bool = _option(False, "no live page at /")
    drain_timeout_s: int = _option(60, "after SIGTERM, how long requests under way may take")
    uvicorn_log_level: str = _option("info", "critical, error, warning, info, debug or trace")
    disable_log_requests: bool = _option(True, "do not log requests (--no-disable-log-requests does)")
    disable_log_stats: bool = _option(False, "no line about the engine every 10 seconds")
    log_format: str = _option("text", "text or json: one object a line")
    otlp_traces_endpoint: str | None = _option(None, "where to send a span per request to, by OTLP")
    profile_dir: str | None = _option(None, "folder for the traces of /start_profile, which is there only with this")

    def __post_init__(self) -> None:
        for name in ("port", "max_request_bytes", "request_timeout_s", "max_queued_requests", "drain_timeout_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.port > 65535:
            raise ValueError(f"port must be 0 to 65535, got {self.port}")
        if self.request_timeout_s == 0:
            raise ValueError("request_timeout_s must be positive: no request arrives in no time")
        for name, known in (("tool_call_parser", TOOL_PARSERS), ("reasoning_parser", REASONING_PARSERS)):
            if getattr(self, name) is not None and getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            raise ValueError("enable_auto_tool_choice needs tool_call_parser: how the model writes its calls")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ValueError("TLS needs both ssl_keyfile and ssl_certfile")
        for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
            if getattr(self, name) is not None and not Path(getattr(self, name)).is_file():
                raise ValueError(f"{name}: there is no file {getattr(self, name)}")
        self.adapters()
        load_chat_template(self.chat_template)
        if any(not key for key in self.api_key):
            raise ValueError("api_key must not be empty")
        if self.log_format not in ("text", "json"):
            raise ValueError(f'log_format must be "text" or "json", got {self.log_format!r}')
        if self.otlp_traces_endpoint is not None:
            require_opentelemetry()
        levels = ("critical", "error", "warning", "info", "debug", "trace")
        if self.uvicorn_log_level not in levels:
            raise ValueError(f"uvicorn_log_level must be one of {', '.join(levels)}, got {self.uvicorn_log_level!r}")

    def adapters(self) -> list[LoRARequest]:
        """`lora_modules`, numbered from 1.

        Raises:
            ValueError: one that is not written as it should be, or a name given twice.
        """
        found: dict[str, LoRARequest] = {}
        for number, text in enumerate(self.lora_modules, start=1):
            name, path, base = _lora_module(text)
            if name in found:
                raise ValueError(f"lora_modules: {name!r} is given twice")
            found[name] = LoRARequest(name, number, path, base_model_name=base)
        return list(found.values())


def _lora_module(text: str) -> tuple[str, str, str | None]:
    """Name, path and base model of NAME=PATH or a JSON object."""
    name, equals, path = text.partition("=")
    if not text.lstrip().startswith("{"):
        if not (name and equals and path):
            raise ValueError(f"lora_modules takes NAME=PATH or a JSON object with name and path, got {text!r}")
        return name, path, None
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"lora_modules: {text!r} is no JSON ({error})") from error
    unknown = given.keys() - {"name", "path", "base_model_name"}
    if unknown or not (given.get("name") and given.get("path")):
        raise ValueError(f"lora_modules: an adapter has a name, a path and perhaps a base_model_name, got {text}")
    return given["name"], given["path"], given.get("base_model_name")


SERVER_FIELDS = {f.name: f for f in fields(ServerOptions)}
MODEL_FIELDS = {f.name: f for f in (*fields(EngineConfig), *fields(EngineArgs)) if f.name not in ("engine", "model")}


def parse_options(arguments: Sequence[str]) -> tuple[ServerOptions, EngineArgs]:
    """Out of a command line: MODEL and options, `--name value`, `--name=value`, `--flag`, `--no-flag`; `--config FILE`
    names a YAML file with more, which the command line goes before.

    Raises:
        ValueError, TypeError: an option that nobody knows (the message suggests the nearest), or a bad value.
        FileNotFoundError: no such file of options.
    """
    given = _read_command(arguments)
    if "config" in given:
        given = _read_yaml(Path(str(given.pop("config")))) | given
    model = given.pop("model", None)
    if model is None:
        raise ValueError("which model? hf-paged serve MODEL: a folder, a name on the hub, a GGUF file, or smollm2")
    server = {name: given.pop(name) for name in list(given) if name in SERVER_FIELDS}
    if model != checkpoint(model):  # a name of ours is what clients should see, not where its file lies
        server.setdefault("served_model_name", [model])
    options, args = ServerOptions(**server), EngineArgs.parse(checkpoint(model), given)
    if (options.lora_modules or options.allow_runtime_lora) and not args.engine_config().enable_lora:
        raise ValueError("--lora-modules and --allow-runtime-lora need --enable-lora: room for adapters")
    return options, args


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    content = read_text(file, "file of options")
    try:
        found = yaml.safe_load(content) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{file} must map names of options to values")
    options = {}
    for name, value in found.items():
        key = _known(str(name))
        several = key in SERVER_FIELDS and _kind(key).startswith("list")
        options[key] = [_text(one) for one in (value if isinstance(value, list) else [value])] if several else value
    return options


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _read_command(arguments: Sequence[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            if "model" in given:
                raise ValueError(f"one model is served, got {given['model']!r} and {word!r}")
            given["model"] = word
            continue
        name, equals, value = word[2:].partition("=")
        if name.startswith("no-") and name[3:].replace("-", "_") not in SERVER_FIELDS | MODEL_FIELDS:
            raise ValueError(f"there is no option --{name}")
        if name.startswith("no-"):
            given[_known(name[3:])] = False
            continue
        key = _known(name)
        kind = _kind(key)
        if kind == "bool" and not equals:
            given[key] = rest.pop(0).lower() == "true" if rest and rest[0].lower() in ("true", "false") else True
            continue
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--") and (not values or kind.startswith("list")):
            values.append(rest.pop(0))
        if not values and key not in PLAIN:
            raise ValueError(f"--{name} needs a value")
        given[key] = values if kind.startswith("list") else _value(key, values[0]) if values else True
    return given


def _known(name: str) -> str:
    key = name.replace("-", "_")
    if key in ("config", "model") or key in SERVER_FIELDS or key in MODEL_FIELDS or key in PLAIN:
        return key
    near = difflib.get_close_matches(key, [*SERVER_FIELDS, *MODEL_FIELDS, *PLAIN, "config"], n=1)
    hint = f" Did you mean --{near[0].replace('_', '-')}?" if near else " --help lists them."
    raise ValueError(f"there is no option --{name}.{hint}")


def _kind(key: str) -> str:
    known = SERVER_FIELDS.get(key) or MODEL_FIELDS.get(key)
    return str(known.type) if known is not None else "Any"


def _value(key: str, text: str) -> Any:
    """Numbers, true, false, null and JSON objects where a field takes such; text as it is."""
    import yaml

    kind = _kind(key)
    if kind in ("str", "str | None"):
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if kind in ("int", "int | None") and not isinstance(value, int):
        raise ValueError(f"--{key.replace('_', '-')} must be an integer, got {text!r}")
    return value


def help_text() -> str:
    """What `--help` shows."""
    lines = ["usage: hf-paged serve MODEL [options]", "", "Serve a model with OpenAI's API.", "", "server:"]
    for name, known in SERVER_FIELDS.items():
        default = getattr(ServerOptions(), name)
        shown = f" (default: {default})" if default not in (None, "", []) else ""
        lines.append(f"  --{name.replace('_', '-'):<26} {known.metadata['help']}{shown}")
    lines += ["", "  --config FILE               a YAML file of options; the command line goes before it", "", "model:"]
    names = [f"--{name.replace('_', '-')}" for name in MODEL_FIELDS]
    lines += [f"  {', '.join(names[i : i + 4])}" for i in range(0, len(names), 4)]
    lines += ["", "These have the names and meanings of vLLM's (hf_paged.EngineArgs) and of hf_paged.EngineConfig."]
    return "\n".join(lines)
