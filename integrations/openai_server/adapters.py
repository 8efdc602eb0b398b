"""Adapters that clients name as their model: which there are, and loading and unloading while the server runs."""

from __future__ import annotations

import logging
import threading

from hf_paged.engine.front import FrontEngine
from hf_paged.integrations.openai_server.errors import ApiError
from hf_paged.integrations.openai_server.protocol import LoadLoraRequest, UnloadLoraRequest
from hf_paged.lora.request import LoRARequest

logger = logging.getLogger(__name__)


class Adapters:
    """The adapters of a server, by name. Any number of threads may call.

    Args:
        engine: with room for adapters, where `given` names any.
        given: those that are there from the beginning; they are read now.

    Raises:
        ValueError, FileNotFoundError: one of them cannot be had.
    """

    def __init__(self, engine: FrontEngine, given: list[LoRARequest]) -> None:
        self._engine = engine
        self._changing = threading.Lock()
        self._last = max((request.lora_int_id for request in given), default=0)
        for request in given:
            engine.add_lora(request)
        self._named = {request.lora_name: request for request in given}

    def get(self, name: str) -> LoRARequest | None:
        return self._named.get(name)

    def all(self) -> list[LoRARequest]:
        return list(self._named.values())

    def load(self, body: LoadLoraRequest, taken: list[str]) -> str:
        """Reads an adapter and gives it a name. Returns vLLM's words for it.

        Args:
            taken: names of the model itself.

        Raises:
            ApiError: 400, the name is taken or the adapter cannot be served; 404, there is none.
        """
        name = body.lora_name
        with self._changing:
            held = self._named.get(name)
            if name in taken:
                raise ApiError(400, f"{name!r} is a name of the model itself", param="lora_name")
            if held is not None and not body.load_inplace:
                raise ApiError(
                    400,
                    f"The lora adapter {name!r} has already been loaded. To read it anew, set 'load_inplace' to true.",
                    param="lora_name",
                )
            number = self._last + 1 if held is None else held.lora_int_id
            try:
                self._engine.add_lora(LoRARequest(name, number, body.lora_path, load_inplace=body.load_inplace))
            except FileNotFoundError as error:
                raise ApiError(404, str(error), param="lora_path") from error
            self._last = max(self._last, number)
            self._named = self._named | {name: LoRARequest(name, number, body.lora_path)}
        logger.info("adapter %r is served from %s", name, body.lora_path)
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: UnloadLoraRequest) -> str:
        """Takes a name away: requests under way go on with the adapter, new ones do not find it.

        Raises:
            ApiError: 404, there is no such name.
        """
        name = body.lora_name
        with self._changing:
            request = self._named.get(name)
            if request is None:
                raise ApiError(404, f"The lora adapter {name!r} cannot be found.", param="lora_name")
            self._named = {other: held for other, held in self._named.items() if other != name}
            self._engine.remove_lora(request.lora_int_id)
        logger.info("adapter %r is not served any more", name)
        return f"Success: LoRA adapter '{name}' removed successfully."
