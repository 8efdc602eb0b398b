"""Sampler: one row of logits per sequence in, one token per sequence out, all rows in one batched pass."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from hf_paged.engine.request import Sequence
from hf_paged.sampling import processors
from hf_paged.sampling.draw import draw, filter_logits, uniforms
from hf_paged.sampling.errors import NonFiniteLogits, NothingToSample
from hf_paged.sampling.fused import rows_of
from hf_paged.sampling.logprobs import TokenLogprobs, token_logprobs
from hf_paged.sampling.structured import forbid_others
from hf_paged.sampling_params import GREEDY_BELOW


@dataclass(slots=True)
class Sampled:
    """Per sequence, in order."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    errors: dict[int, Exception] = field(default_factory=dict)
    """Which sequences (by place) could not be sampled, and why; their tokens mean nothing."""


class Sampler:
    """Adjusts, draws and reports, following transformers' order (see `SamplingParams`).

    Args:
        vocab_size: V.
        exact: report log-probabilities in a trainer's arithmetic (`exact_logprobs`), unless they are of processed
            scores, which no trainer has.
    """

    def __init__(self, vocab_size: int, device: torch.device, *, exact: bool = False) -> None:
        self.device = device
        self._exact = exact
        self._penalties = processors.PenaltyState(vocab_size, device)

    @torch.no_grad()
    def sample(self, logits: Tensor, sequences: list[Sequence]) -> Sampled:
        """One token per sequence.

        Args:
            logits: `[R, V]`, a row per sequence, any float dtype. Not changed.
        """
        simple = all(sequence.request.simple for sequence in sequences)
        if simple and all(sequence.request.sampling.greedy for sequence in sequences):
            best = logits.max(-1)
            if bool(torch.isfinite(best.values).all()):
                return Sampled(best.indices.tolist(), [None] * len(sequences))
        raw = logits.float()
        errors: dict[int, Exception] = {}
        scores = raw if simple else self._adjust(raw.clone(), sequences, errors)
        peaks = scores.amax(-1)
        if not bool(torch.isfinite(peaks).all()):
            scores = self._set_aside(raw, scores if scores is not raw else raw.clone(), peaks, sequences, errors)
        tokens, scores = self._draw(scores, sequences)
        if simple:
            return Sampled(tokens, [None] * len(tokens), errors)
        self._keep_for_hooks(raw, scores, sequences)
        report = self._report(raw, scores, tokens, sequences)
        return Sampled(tokens, self._report_exactly(logits, report, sequences) if self._exact else report, errors)

    @torch.no_grad()
    def draft(self, logits: Tensor, sequences: list[Sequence]) -> list[int]:
        """One token per sequence by temperature and filters alone, for another model's logits `[R, V]`."""
        return self._draw(torch.nan_to_num(logits.float()), sequences)[0]

    # ---- before the draw -----------------------------------------------------------------------------------

    def _adjust(self, logits: Tensor, sequences: list[Sequence], errors: dict[int, Exception]) -> Tensor:
        """Everything that SamplingParams' order puts before temperature, in place on `[R, V]`."""
        for row, sequence in enumerate(sequences):
            if sequence.request.sampling.logit_bias:
                processors.bias(logits[row], sequence.request.sampling.logit_bias)
        penalised = [row for row, sequence in enumerate(sequences) if sequence.request.penalised]
        if penalised:
            index = torch.tensor(penalised, device=logits.device)
            chosen = logits[index]
            processors.apply_penalties(chosen, [sequences[row] for row in penalised], self._penalties)
            logits[index] = chosen
        for row, sequence in enumerate(sequences):
            if sequence.request.simple:
                continue
            processors.forbid(logits[row], sequence)
            try:
                changed = processors.call_processors(logits[row], sequence)
            except (
                Exception
            ) as error:  # a caller's function may raise anything, and it is the caller's request that fails
                errors[row] = error
            else:
                if changed is not logits[row]:
                    logits[row] = changed
        forbid_others(logits, sequences, errors)
        return logits

    def _set_aside(
        self, raw: Tensor, scores: Tensor, peaks: Tensor, sequences: list[Sequence], errors: dict[int, Exception]
    ) -> Tensor:
        """Rows that nothing can be drawn from fail their request; the arithmetic goes on with zeros in their place."""
        for row in (~torch.isfinite(peaks)).nonzero()[:, 0].tolist():
            peak = float(peaks[row])
            start = (
                f"request {sequences[row].request.request_id!r}: nothing can be sampled after "
                f"{sequences[row].num_generated} tokens, "
            )
            own = float(raw[row].amax())
            if not math.isfinite(own):
                errors[row] = NonFiniteLogits(start + f"the largest of the model's logits is {own}")
            elif peak == -math.inf:
                errors.setdefault(row, NothingToSample(start + "every token is forbidden"))
            else:
                errors.setdefault(row, NothingToSample(start + f"its processors left {peak} among the logits"))
            scores[row] = 0.0
        return scores

    # ---- the draw ------------------------------------------------------------------------------------------

    def _draw(self, scores: Tensor, sequences: list[Sequence]) -> tuple[list[int], Tensor]:
        """Tokens, and the scores they were drawn from, with filters shown where somebody will look."""
        temperature = np.array([sequence.request.sampling.temperature for sequence in sequences])
        random = np.flatnonzero(temperature >= GREEDY_BELOW)
        if not len(random):
            return scores.argmax(-1).tolist(), scores
        shown = [row for row in random.tolist() if self._shows_scores(sequences[row])]
        if self.device.type == "cuda":
            tokens, filtered = self._draw_fused(scores, sequences, shown)
        else:
            tokens, filtered = self._draw_inverse(scores, sequences, random, shown)
        if shown:
            scores = scores.clone()
            scores[shown] = filtered
        return tokens.tolist(), scores

    def _draw_inverse(
        self, scores: Tensor, sequences: list[Sequence], random: np.ndarray, shown: list[int]
    ) -> tuple[Tensor, Tensor]:
        """By inverse CDF. Tokens of all rows, int64 `[R]`, and the filtered scores of those in `shown`."""
        params = [sequence.request.sampling for sequence in sequences]
        tokens = scores.argmax(-1) if len(random) < len(params) else scores.new_empty(len(params), dtype=torch.int64)
        warm = self._warm(scores, sequences, random.tolist())
        noise = uniforms(
            np.array([sequences[row].request.seed for row in random], dtype=np.uint64),
            np.array([sequences[row].index for row in random], dtype=np.uint64),
            _positions([sequences[row] for row in random]).astype(np.uint64),
        )
        top_k = np.array([max(params[row].top_k, 0) for row in random])
        top_p = np.array([params[row].top_p for row in random])
        min_p = np.array([params[row].min_p for row in random])
        where = torch.from_numpy(random).to(self.device)
        tokens[where] = draw(warm, torch.from_numpy(noise).to(self.device), top_k, top_p, min_p)
        filtered = self._warm(scores, sequences, shown)
        for i, row in enumerate(shown):
            p = params[row]
            filtered[i] = filter_logits(filtered[i], max(p.top_k, 0), p.top_p, p.min_p)
        return tokens, filtered

    def _draw_fused(self, scores: Tensor, sequences: list[Sequence], shown: list[int]) -> tuple[Tensor, Tensor]:
        """As `_draw_inverse`, by the kernel that decode steps in CUDA graphs use, so that a seed means the same."""
        from hf_paged.kernels.triton.sampling import find_thresholds, sample_tokens

        count = len(sequences)
        rows = rows_of(sequences, _positions(sequences), self.device)
        tokens = torch.empty(count, dtype=torch.int64, device=self.device)
        logprobs = torch.empty(count, dtype=torch.float32, device=self.device)
        ranks = torch.empty(count, dtype=torch.int32, device=self.device)
        sample_tokens(scores, rows, tokens=tokens, logprobs=logprobs, ranks=ranks)
        filtered = self._warm(scores, sequences, shown)
        if shown:  # by the thresholds of the draw itself: ties at the end of top-p all stay
            index = torch.tensor(shown, device=self.device)
            forbidden = scores[index] < find_thresholds(scores, rows)[index, None]
            filtered.masked_fill_(forbidden, -torch.inf)
        return tokens, filtered

    def _warm(self, scores: Tensor, sequences: list[Sequence], rows: list[int]) -> Tensor:
        """float32 `[len(rows), V]`: these rows' scores divided by their temperatures."""
        chosen = scores if len(rows) == len(sequences) else scores[rows]
        temperature = [sequences[row].request.sampling.temperature for row in rows]
        return chosen / torch.tensor(temperature, dtype=torch.float32, device=self.device)[:, None]

    def _shows_scores(self, sequence: Sequence) -> bool:
        hooks = sequence.request.hooks
        return sequence.request.shows_processed or (
            hooks is not None and (hooks.keep_scores or bool(hooks.stopping_criteria))
        )

    # ---- after it ------------------------------------------------------------------------------------------

    def _keep_for_hooks(self, raw: Tensor, scores: Tensor, sequences: list[Sequence]) -> None:
        for row, sequence in enumerate(sequences):
            hooks = sequence.request.hooks
            if hooks is None:
                continue
            # A step that failed after this point is computed again, and rows of drafts may be rejected: what they leave
            # here is overwritten.
            if hooks.keep_logits:
                hooks.logits[sequence.num_generated :] = [raw[row].clone()]
            if hooks.keep_scores or hooks.stopping_criteria:
                hooks.scores[sequence.num_generated :] = [scores[row].clone()]

    def _report(
        self, raw: Tensor, scores: Tensor, tokens: list[int], sequences: list[Sequence]
    ) -> list[TokenLogprobs | None]:
        wanted = [row for row, sequence in enumerate(sequences) if sequence.request.sampling.logprobs is not None]
        report: list[TokenLogprobs | None] = [None] * len(tokens)
        if wanted:
            counts = [sequences[row].request.sampling.logprobs or 0 for row in wanted]
            logits = raw[torch.tensor(wanted, device=self.device)]  # a copy
            for place, row in enumerate(wanted):
                request = sequences[row].request
                if request.shows_processed:
                    logits[place] = scores[row]
                elif request.logprob_temperature != 1.0:
                    logits[place] /= request.logprob_temperature
            found = token_logprobs(logits, [tokens[row] for row in wanted], counts)
            for row, entry in zip(wanted, found, strict=True):
                report[row] = entry
        return report

    def _report_exactly(
        self, logits: Tensor, report: list[TokenLogprobs | None], sequences: list[Sequence]
    ) -> list[TokenLogprobs | None]:
        """The report with the tokens' own log-probabilities out of logits `[R, V]` as the model computed them."""
        from hf_paged.kernels.triton.exact_logprobs import exact_logprobs

        wanted = {
            row: entry
            for row, (entry, sequence) in enumerate(zip(report, sequences, strict=True))
            if entry is not None and not sequence.request.shows_processed
        }
        scales = [1.0 / sequences[row].request.logprob_temperature for row in wanted]
        values = exact_logprobs(
            logits[torch.tensor(list(wanted), dtype=torch.int64, device=self.device)],
            torch.tensor([entry.token_ids[0] for entry in wanted.values()], dtype=torch.int64, device=self.device),
            torch.tensor(scales, dtype=torch.float32, device=self.device),
        ).tolist()
        exact = list(report)
        for (row, entry), value in zip(wanted.items(), values, strict=True):
            exact[row] = replace(entry, logprobs=[value, *entry.logprobs[1:]])
        return exact


def _positions(sequences: list[Sequence]) -> np.ndarray:
    """int64 [R]: how many tokens precede the one to draw, those on their way included."""
    return np.array([sequence.num_generated + sequence.num_pending for sequence in sequences], dtype=np.int64)
