"""The live page: what the engine does, in a browser, as it does it."""

from hf_paged.integrations.openai_server.live.feed import Feed
from hf_paged.integrations.openai_server.live.page import live_page

__all__ = ["Feed", "live_page"]
