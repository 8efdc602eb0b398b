"""HeldModel: a transformers model, its pages, and what is bound to their addresses. Puts the rooms `model`,
`attention` and `sampling` to work."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hf_paged.attention.backend import AttentionBackend
from hf_paged.attention.select import choose_backend, exact_backend
from hf_paged.attention.shared import SharedPlanner, can_share
from hf_paged.cache.storage import KVStorage, choose_num_pages, page_bytes
from hf_paged.config import EngineConfig
from hf_paged.distributed.shard import cuts_of, parallel_of
from hf_paged.engine.defaults import default_num_seqs, token_budget, verify_rows
from hf_paged.engine.executor import Executor
from hf_paged.lora.layers import LoraLayers
from hf_paged.lora.slots import AdapterSlots
from hf_paged.model.compile import CompiledLayers, decoder_layers
from hf_paged.model.exact import why_inexact
from hf_paged.model.fuse import FusedLinears, find_groups
from hf_paged.model.graphs import DecodeGraphs
from hf_paged.model.inputs import InputBuilder
from hf_paged.model.introspect import causal_lm, dry_forward, inspect_model, structure
from hf_paged.model.kv_scales import with_measured_scales, with_stored_scales
from hf_paged.model.linear import LeanLinears
from hf_paged.model.memory import measure_activations
from hf_paged.model.mixed_graphs import SIZES as MIXED_SIZES
from hf_paged.model.mixed_graphs import MixedGraphs
from hf_paged.model.runner import ModelRunner
from hf_paged.model.selfcheck import check_model, check_prompt
from hf_paged.model.weights import WeightWatch
from hf_paged.quantization.bitsandbytes import why_uncapturable
from hf_paged.sampling.device import DeviceSampler, Draw
from hf_paged.sampling.sampler import Sampler
from hf_paged.speculative.config import SpeculativeConfig
from hf_paged.speculative.in_step import InStepDrafter, load_drafter

logger = logging.getLogger(__name__)

CPU_PAGE_SIZE, GPU_PAGE_SIZE = 32, 16


class HeldModel(Executor):
    """What a `ModelExecutor` computes with: made, given back and taken again; its arguments are explained there."""

    draws = True
    """Whether steps end with logits, of which tokens are drawn; else what they return is empty."""

    def __init__(self, model: nn.Module, config: EngineConfig, speculation: SpeculativeConfig | None = None) -> None:
        start = time.monotonic()
        self._model, self._lm, self._config = model, causal_lm(model), config
        self.layout = layout = inspect_model(model)
        device = layout.device
        on_gpu = device.type == "cuda"
        self.max_model_len = config.max_model_len or layout.max_model_len
        if self.max_model_len > layout.max_model_len:
            raise ValueError(
                f"max_model_len ({self.max_model_len}) exceeds the model's own limit of {layout.max_model_len}"
            )
        self.page_size = config.page_size or (GPU_PAGE_SIZE if on_gpu else CPU_PAGE_SIZE)
        tokens, sequences = config.max_num_batched_tokens, config.max_num_seqs
        self.max_num_batched_tokens = tokens or max(token_budget(device), sequences or 0)
        self.max_num_seqs = sequences or min(default_num_seqs(device), self.max_num_batched_tokens)
        self.max_verify_rows = min(verify_rows(device), self.max_num_batched_tokens)
        self._kv_dtype = torch.float8_e4m3fn if config.kv_cache_dtype != "auto" else layout.kv_dtype
        if self._kv_dtype != layout.kv_dtype and not config.calculate_kv_scales:
            self.layout = layout = with_stored_scales(layout)
        self._measures = config.calculate_kv_scales
        """The first prompts are still to come, by which keys and values are scaled."""
        self._backend = self._choose_backend()
        self._speculation = speculation
        self.drafter: InStepDrafter | None = None
        """A draft model or head, where the configuration names one."""
        self.adapters: AdapterSlots | None = None
        """Where adapters by request lie on the device, if there may be any."""
        self.storage: KVStorage | None = None
        self._draft_storage: KVStorage | None = None
        self._asleep = False
        """The pools have their addresses and no memory."""
        self._graphs: DecodeGraphs | None = None
        self._mixed: MixedGraphs | None = None
        self._stream: torch.cuda.Stream | None = None
        """The stream of the last work: whatever comes next comes after it."""
        self._previous: Tensor | None = None
        """int64, the tokens that the last launched step sampled, on the device."""
        self._waiting: Draw | None = None
        """The draw of the last launched step, while it waits for what may be drawn."""
        self._watch = WeightWatch(self._lm)
        self._fuses = config.fuse_linear or (config.fuse_linear is None and on_gpu and not config.exact)
        self._fused: FusedLinears | None = None
        try:
            # Not every operation of torch goes by its tensors' device.
            with torch.cuda.device(device) if on_gpu else nullcontext():
                self._build(on_gpu)
        except BaseException:
            self.close()
            raise
        logger.info("engine ready in %.1f s", time.monotonic() - start)

    def _choose_backend(self) -> AttentionBackend:
        config, layout = self._config, self.layout
        if config.exact:
            if reason := why_inexact(self._lm):
                raise ValueError(f"exact=True cannot be had for {type(self._lm).__name__}: {reason}")
            return exact_backend(layout.device)
        return choose_backend(config.attention_backend, layout.device, layout.kv_dtype, self._kv_dtype, layout.layers)

    def _build(self, on_gpu: bool) -> None:
        model, layout, config, device = self._model, self.layout, self._config, self.layout.device
        self._fused = self._fuse()
        self._lean = LeanLinears(self._lm) if on_gpu and not config.exact else None
        options: dict[str, Any] = {"fused": self._fused, "lean": self._lean, "exact": config.exact}
        checked = with_measured_scales(model, layout, [check_prompt(layout)]) if self._measures else layout
        check_model(model, checked, self._backend, kv_dtype=self._kv_dtype, **options)
        self.drafter = load_drafter(self._speculation, config, self._lm, layout)
        self._compiled: CompiledLayers | None = None
        if config.compile == "layers" or (config.compile is None and on_gpu and not config.exact):
            spread = parallel_of(self._lm) is not None
            self._compiled = CompiledLayers(decoder_layers(self._lm, layout.modules), spread=spread)
        if config.enable_lora:
            self.adapters = self._make_slots()
        self._captures = on_gpu and config.cuda_graphs and hasattr(self._backend, "capture_decode")
        if self._captures and (reason := why_uncapturable(self._lm)):
            logger.info("steps run without CUDA graphs: %s", reason)
            self._captures = False

        activations = 0
        if on_gpu and config.num_pages is None and config.kv_cache_memory_bytes is None:
            rows = self.max_num_batched_tokens, self.max_num_seqs
            lora = self.adapters.layers if self.adapters is not None else None
            activations = measure_activations(
                model, layout, self._backend, *rows, exact=config.exact, fused=self._fused, lora=lora
            )
        self.num_pages = self._choose_num_pages(activations)
        self._max_pages = -(-self.max_model_len // self.page_size) + 1
        self._inputs = InputBuilder(self.page_size, self.max_num_seqs, self._max_pages)
        self._num_weights = self._count_weights()
        self._sharing = self._new_planner()
        self._sampler = Sampler(layout.vocab_size, device, exact=config.exact)
        self._device_sampler: DeviceSampler | None = None
        if on_gpu:
            most = max(self.max_num_seqs, self.max_verify_rows)
            self._device_sampler = DeviceSampler(most, device, exact=config.exact, in_flight=self.most_in_flight)
        self._looks_ahead = on_gpu if config.async_scheduling is None else config.async_scheduling
        self._signs = self._read_signs()
        self._allocate()

    def _make_slots(self) -> AdapterSlots:
        config = self._config
        # A graph's padding counts too.
        rows = max(self.max_num_batched_tokens, self.max_num_seqs, self.max_verify_rows, MIXED_SIZES[-1])
        rank = max(16, 1 << (config.max_lora_rank - 1).bit_length())  # what kernels multiply by
        with torch.inference_mode(False):
            layers = LoraLayers(
                self._lm,
                self.layout.modules,
                config.max_loras,
                rank,
                self.layout.kv_dtype,
                rows,
                self._fused.groups if self._fused is not None else (),
                cuts_of(self._lm),
                self.most_in_flight,
            )
            return AdapterSlots(layers)

    def _choose_num_pages(self, activations: int) -> int:
        size, length, sequences = self._page_bytes(), self.max_model_len, self.max_num_seqs
        return choose_num_pages(
            self._config, self.page_size, size, self.layout.device, length, sequences, activations
        )  # fmt: skip

    def _page_bytes(self) -> int:
        size = page_bytes(self.layout.layers, self.page_size, self._kv_dtype)
        if self.drafter is not None:
            size += page_bytes(self.drafter.layers, self.page_size, self.drafter.dtype)
        return size

    def _fuse(self) -> FusedLinears | None:
        if not self._fuses:
            return None
        groups = find_groups(self._lm, lambda: dry_forward(self._lm))
        return FusedLinears(groups) if groups else None

    def _unfuse(self, fused: FusedLinears) -> None:
        self._watch.forget()
        if self.adapters is not None:
            self.adapters.layers.forget()
        fused.release()

    def _count_weights(self) -> int:
        """Those of quantised layers too, which are no parameters."""
        lm = self._lm
        linear = sum(m.in_features * m.out_features for m in lm.modules() if isinstance(m, nn.Linear))
        return max(linear, sum(parameter.numel() for parameter in lm.parameters()))

    def _new_planner(self) -> SharedPlanner | None:
        """Who plans what decodes read together, if the backend can and any layer would."""
        layers = [layer for layer in self.layout.layers if can_share(layer)]
        if not self._backend.shares or not layers or self.layout.device.type != "cuda":
            return None
        layer = layers[0]
        return SharedPlanner(
            page_size=self.page_size,
            token_bytes=layer.num_kv_heads * (layer.key_dim + layer.value_dim) * self._kv_dtype.itemsize,
            kv_heads=layer.num_kv_heads,
            group=max(layer.num_heads // layer.num_kv_heads for layer in self.layout.layers),
            multiprocessors=torch.cuda.get_device_properties(self.layout.device).multi_processor_count,
        )

    def _allocate(self) -> None:
        """The pools, and what is bound to their addresses."""
        layout = self.layout
        with self._in_order():
            storage = KVStorage(
                layout.layers,
                self.num_pages,
                self.page_size,
                dtype=self._kv_dtype,
                device=layout.device,
                layout=self._backend.layout,
                remappable=True,
            )
            self._runner = ModelRunner(
                self._model,
                layout,
                self._backend,
                storage,
                fused=self._fused,
                lean=self._lean,
                compiled=self._compiled,
                exact=self._config.exact,
                hidden=self.drafter.hidden if self.drafter is not None else None,
                lora=self.adapters.layers if self.adapters is not None else None,
            )
            if self.drafter is not None:
                self._draft_storage = self.drafter.allocate(self.num_pages, self._inputs)
            self.storage = storage
            self._make_graphs()

    def _make_graphs(self) -> None:
        if self._graphs is not None:
            self._graphs = self._mixed = None
            self._free_unused()
        if not self._captures:
            return
        backend: Any = self._backend
        if self.drafter is not None:
            self.drafter.make_graphs(self.max_num_seqs, self.max_verify_rows)
        # Drafts are asked for by requests too, not by the configuration alone.
        rows = max(self.max_num_seqs, self.max_verify_rows)
        shape = self.max_num_seqs, self._max_pages, self.page_size, rows
        self._graphs = DecodeGraphs(
            self._runner, backend, *shape, self.most_in_flight, draws=self.draws, exact=self._config.exact
        )
        # Their forwards are of more rows than hidden states of graphs have a place for.
        if hasattr(backend, "capture_mixed") and (self.drafter is None or self.drafter.hidden is None):
            self._mixed = MixedGraphs(self._runner, backend, self._graphs, self._num_weights)

    @contextmanager
    def _in_order(self) -> Iterator[None]:
        """Around everything that is enqueued: callers may be many threads, each on a stream of its own."""
        if self.layout.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.layout.device):
            stream = torch.cuda.current_stream()
            if self._stream is not None and stream != self._stream:
                stream.wait_stream(self._stream)
                if self._previous is not None:
                    self._previous.record_stream(stream)
            self._stream = stream
            yield

    # ---- weights and memory --------------------------------------------------------------------------------

    def _read_signs(self) -> tuple[Any, ...]:
        """What graphs and aliases depend on beside the pools."""
        kind = self.layout.device.type
        drafter = self.drafter.signs() if self.drafter is not None else None
        return self._watch.signs(), drafter, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def _moved(self) -> bool:
        """Whether graphs and aliases are out of date."""
        return self._read_signs() != self._signs

    def prepare(self) -> bool:
        self.wake_up()
        if not self._moved():
            return False
        with self._in_order():
            if self._fused is not None and not self._fused.intact():
                logger.info("parameters moved: linear layers are fused anew")
                self._unfuse(self._fused)
                self._fused = self._runner.fused = self._fuse()
            self._make_graphs()  # with an empty block table
        self._signs = self._read_signs()
        return True

    def weights_changed(self) -> bool:
        return self._watch.changed()

    def optimizer_stepped(self) -> bool:
        return self._watch.optimizer_stepped()

    def wipe(self, pages: list[int]) -> None:
        if not self._asleep:
            with self._in_order():
                for pool in self._pools():
                    pool.zero_pages(pages)

    def outdated(self) -> bool:
        """Whether the model moved, or layers were replaced, so that everything here must be made anew."""
        return structure(self._lm, self.layout.modules) != self.layout.structure

    def _pools(self) -> list[KVStorage]:
        return [pool for pool in (self.storage, self._draft_storage) if pool is not None]

    def sleep(self) -> None:
        if self.storage is None or self._asleep:
            return
        self._waiting = None  # of a step that was given up: it holds logits
        self._asleep = True  # whatever interrupts the release: waking makes it whole
        released = [pool.release() for pool in self._pools()]
        if not all(released):
            self._drop()
        if self.layout.device.type == "cuda":
            torch.cuda.empty_cache()

    def _drop(self) -> None:
        """Lets go of the pools, and of all that is bound to their addresses."""
        self.storage = self._draft_storage = self._graphs = self._mixed = self._previous = None
        if self.drafter is not None:
            self.drafter.drop()
        self._asleep = False
        self._runner.close()
        self._free_unused()

    def _free_unused(self) -> None:
        """After graphs were dropped: cuBLAS keeps a workspace for every stream that one was captured on."""
        if self.layout.device.type == "cuda":
            torch.cuda.synchronize(self.layout.device)
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()

    def wake_up(self) -> None:
        if self.storage is None:
            self._allocate()
        elif self._asleep:
            with self._in_order():
                for pool in self._pools():
                    pool.restore()
            self._asleep = False

    def close(self) -> None:
        self.sleep()
        if self.storage is not None:
            self._drop()
        if self._fused is not None:
            self._unfuse(self._fused)
            self._fused = None
        if self.drafter is not None:
            self.drafter.close()
