"""An OpenAI-compatible server: `hf-paged serve MODEL`, or `make_app` for an ASGI application of your own."""

from hf_paged.integrations.openai_server.app import make_app
from hf_paged.integrations.openai_server.options import ServerOptions

__all__ = ["ServerOptions", "make_app"]
