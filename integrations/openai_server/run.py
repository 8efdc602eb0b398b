"""`hf-paged serve`: the server as a program."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hf_paged.llm.arguments import EngineArgs
from hf_paged.observe.logs import configure_logging

if TYPE_CHECKING:
    from hf_paged.integrations.openai_server.options import ServerOptions


def serve(arguments: Sequence[str]) -> None:
    """Serves until it is told to stop: SIGTERM and Ctrl-C let what is under way finish first.

    Raises:
        ImportError: the extra is not installed; the message names it.
        ValueError, TypeError, FileNotFoundError: bad options.
        OSError: nobody can listen at the address.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ImportError(f"serving needs {error.name}: pip install 'hf_paged[server]'") from error
    from hf_paged.integrations.openai_server.options import help_text, parse_options

    if not arguments or any(word in ("--help", "-h") for word in arguments):
        print(help_text())
        return
    options, args = parse_options(arguments)
    configure_logging(options.log_format)
    from hf_paged.integrations.openai_server.app import make_app
    from hf_paged.integrations.openai_server.connections import allow_many_connections, timed_protocol
    from hf_paged.integrations.openai_server.http_server import HttpServer

    allow_many_connections()
    _check_before_loading(options)
    model, ranks = args.load()
    app = make_app(model, options, defaults=_defaults(model, args), name=str(args.model))
    try:
        config = uvicorn.Config(
            app,
            host=options.host,
            port=options.port,
            http=timed_protocol(options.request_timeout_s),
            uds=options.uds,
            log_config=None,
            log_level=options.uvicorn_log_level,
            access_log=not options.disable_log_requests,
            ssl_keyfile=options.ssl_keyfile,
            ssl_certfile=options.ssl_certfile,
            ssl_ca_certs=options.ssl_ca_certs,
            timeout_graceful_shutdown=options.drain_timeout_s,
            root_path=options.root_path,
        )
        server = HttpServer(config)
        with suppress(KeyboardInterrupt):  # it has drained
            server.run()
        if not server.started:
            sys.exit(1)
    finally:
        if options.uds is not None:
            Path(options.uds).unlink(missing_ok=True)
        if ranks is not None:
            ranks.stop()


def _check_before_loading(options: ServerOptions) -> None:
    """What would else be seen when a large model has been loaded.

    Raises:
        FileNotFoundError: an adapter's folder is not there.
        OSError: nobody can listen at the address.
    """
    for adapter in options.adapters():
        if not Path(adapter.lora_path).is_dir():
            raise FileNotFoundError(f"--lora-modules: there is no folder {adapter.lora_path} ({adapter.lora_name})")
    if options.uds is not None or not options.port:
        return
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        where = f"{options.host}:{options.port}"
        raise OSError(f"cannot listen at {where} ({error.strerror}): give another --host or --port") from error


def _defaults(model: object, args: EngineArgs) -> dict[str, object]:
    from hf_paged.llm.llm import sampling_defaults

    return sampling_defaults(model, args)
