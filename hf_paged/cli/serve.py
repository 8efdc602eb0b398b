"""`hf-paged serve`."""

from __future__ import annotations

import typer

from hf_paged.cli.terminal import friendly

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Typer leaves the arguments to the server, which has options by the dozen, from YAML files too."""


def serve(context: typer.Context) -> None:
    """Serve a model with OpenAI's API: hf-paged serve MODEL; --help lists its options."""
    from hf_paged.integrations.openai_server.run import serve as run_server

    def run() -> None:
        try:
            run_server(context.args)
        except (ValueError, TypeError) as error:
            raise typer.BadParameter(str(error)) from error

    friendly(run, OSError)
