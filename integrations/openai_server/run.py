"""`hf-paged serve`: the server as a program."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from hf_paged.llm.arguments import EngineArgs


def serve(arguments: Sequence[str]) -> None:
    """Serves until it is told to stop: SIGTERM and Ctrl-C let what is under way finish first.

    Raises:
        ImportError: the extra is not installed; the message names it.
        ValueError, TypeError, FileNotFoundError: bad options.
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
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    from hf_paged.integrations.openai_server.app import make_app
    from hf_paged.integrations.openai_server.connections import allow_many_connections, timed_protocol

    allow_many_connections()
    model, ranks = args.load()
    app = make_app(model, options, defaults=_defaults(model, args), name=str(args.model))
    try:
        uvicorn.run(
            app,
            host=options.host,
            port=options.port,
            http=timed_protocol(options.request_timeout_s),
            uds=options.uds,
            log_level=options.uvicorn_log_level,
            access_log=not options.disable_log_requests,
            ssl_keyfile=options.ssl_keyfile,
            ssl_certfile=options.ssl_certfile,
            ssl_ca_certs=options.ssl_ca_certs,
            timeout_graceful_shutdown=options.drain_timeout_s,
            root_path=options.root_path,
        )
    finally:
        if ranks is not None:
            ranks.stop()


def _defaults(model: object, args: EngineArgs) -> dict[str, object]:
    from hf_paged.llm.llm import sampling_defaults

    return sampling_defaults(model, args)
