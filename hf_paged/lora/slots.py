"""AdapterSlots: which adapters a device holds, and which rows of a step are whose."""

from __future__ import annotations

import numpy as np

from hf_paged.engine.batch import Batch
from hf_paged.lora.adapter import Adapter
from hf_paged.lora.layers import LoraLayers


class AdapterSlots:
    """Brings adapters to the device when a step needs them, in place of the least recently used.

    Everything is enqueued: what a step before still reads is overwritten after it.

    Args:
        layers: with room for as many adapters as a step may have.
    """

    def __init__(self, layers: LoraLayers) -> None:
        self.layers = layers
        self._held: list[int] = [0] * layers.num_slots
        """By slot, the generation of the adapter that is there; 0 is none."""
        self._used: list[int] = [0] * layers.num_slots
        """By slot, the last step that needed it."""
        self._steps = 0
        self.clear_rows()

    def clear_rows(self) -> None:
        """The next step's rows have no adapters, whatever the step."""
        self._upload(np.empty(0, dtype=np.int64))

    def place(self, batch: Batch) -> bool:
        """Makes ready for a step. Returns whether any of its rows has an adapter; if not, nothing was done."""
        adapters: dict[int, Adapter] = {}
        for sequence in batch.decodes:
            if sequence.request.adapter is not None:
                adapters[sequence.request.adapter.generation] = sequence.request.adapter
        for chunk in batch.chunks:
            if chunk.sequence.request.adapter is not None:
                adapters[chunk.sequence.request.adapter.generation] = chunk.sequence.request.adapter
        if not adapters:
            return False
        self._steps += 1
        slots = self._assign(adapters)
        base = self.layers.num_slots
        of_rows = [slots.get(sequence.request.adapter_generation, base) for sequence in batch.decodes]
        for chunk in batch.chunks:
            of_rows += [slots.get(chunk.sequence.request.adapter_generation, base)] * chunk.length
        self._upload(np.array(of_rows, dtype=np.int64))
        return True

    def _assign(self, adapters: dict[int, Adapter]) -> dict[int, int]:
        """A slot for each, by generation."""
        slots = {generation: slot for slot, generation in enumerate(self._held) if generation in adapters}
        for slot in slots.values():
            self._used[slot] = self._steps
        for generation, adapter in adapters.items():
            if generation in slots:
                continue
            slot = min(range(len(self._held)), key=self._used.__getitem__)
            assert self._used[slot] < self._steps, "a step has more adapters than there are slots"
            self._held[slot] = 0  # an interrupt may leave it half written
            self.layers.write(slot, adapter)
            self._held[slot], self._used[slot] = generation, self._steps
            slots[generation] = slot
        return slots

    def _upload(self, slots: np.ndarray) -> None:
        """Groups a step's rows by slot.

        Args:
            slots: per row; the number of slots stands for no adapter.
        """
        rows = self.layers.rows
        arrays, count = rows.next(), len(slots)
        order = arrays["order"]
        order[:count] = np.argsort(slots, kind="stable")
        order[count:] = np.arange(count, len(order))  # padding is the plain model's
        counts = np.bincount(slots, minlength=len(arrays["starts"]))[:-1]
        arrays["starts"][0] = 0
        np.cumsum(counts, out=arrays["starts"][1:])
        rows.upload()
