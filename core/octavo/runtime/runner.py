"""The runner: applies a StepInput to the device's state, runs the model, samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from octavo.attention.interface import AttentionBackend
from octavo.batch import Batch
from octavo.engine.step import BlockCopy, PromptLogprobs, SampledToken, StepInput, StepOutput
from octavo.kv_cache.interface import KVCache
from octavo.models.decoder import Decoder
from octavo.models.layers import StepContext
from octavo.runtime.buffers import BatchBuffers
from octavo.runtime.failures import named_failures
from octavo.runtime.rows import Row
from octavo.runtime.sampler import sample, token_logprobs

_LOGITS_AT_ONCE = 128  # rows of prompt logits held at a time


@dataclass(frozen=True, slots=True)
class Computed:
    """A step between `submit` and `sample`: what it asked, its batch and its hidden states [T, H]."""

    step: StepInput
    batch: Batch
    hidden: torch.Tensor
    rows: dict[int, Row]


class Runner:
    """One rank's model, caches and rows. Called by one thread, in the order of the steps.

    `provider_names` says in messages whose class is whose.
    """

    def __init__(
        self,
        model: Decoder,
        backends: Sequence[AttentionBackend],
        caches: tuple[KVCache, ...],
        layer_groups: Sequence[int],
        buffers: BatchBuffers,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        provider_names: Mapping[type, str],
    ) -> None:
        self.model = model
        self.backends = backends
        self.caches = caches
        self.layer_groups = layer_groups
        self.buffers = buffers
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.provider_names = provider_names
        self.rows: dict[int, Row] = {}

    @torch.inference_mode()
    def submit(self, step: StepInput) -> Computed:
        """Take over the step's changes and compute its hidden states. Raises StepError."""
        self._apply(step)
        batch = self.buffers.prepare(step, self.rows)
        with named_failures(self.provider_names, self.model.layers, batch.shape):
            plans: tuple[Any, ...] = tuple(backend.plan(batch) for backend in self.backends)
            hidden = self.model.forward(StepContext(batch, plans, self.caches))
        return Computed(step, batch, hidden, dict(self.rows))

    def _apply(self, step: StepInput) -> None:
        buffers = self.buffers
        for row in step.freed_rows:
            self.rows.pop(row, None)
        for new in step.new_rows:
            self.rows[new.row] = Row.start(new, self.vocab_size, self.eos_token_ids, buffers.device)
            for group, blocks in enumerate(new.blocks):
                buffers.set_table(group, new.row, 0, blocks)
        for fork in step.forks:
            self.rows[fork.row] = self.rows[fork.source].fork(fork)
            buffers.fork(fork.source, fork.row)
        for change in step.table_changes:
            buffers.set_table(change.group, change.row, change.start, change.blocks)
        self._copy(step.copies)
        for index, token in step.set_tokens:
            buffers.last_token[index] = token

    def _copy(self, copies: list[BlockCopy]) -> None:
        """Copy blocks bytewise, whatever format they hold."""
        for group in {copy.group for copy in copies}:
            mine = [copy for copy in copies if copy.group == group]
            sources = torch.tensor([copy.source for copy in mine], device=self.buffers.device)
            targets = torch.tensor([copy.target for copy in mine], device=self.buffers.device)
            for cache, layer_group in zip(self.caches, self.layer_groups, strict=True):
                if layer_group == group:
                    cache.raw[targets] = cache.raw[sources]

    @torch.inference_mode()
    def sample(self, computed: Computed) -> StepOutput:
        """Sample the step's rows, and leave each one's token on the device as its next input. Raises StepError."""
        with named_failures(self.provider_names, (), computed.batch.shape):
            return StepOutput(computed.step.step_id, self._sample(computed), self._prompt_logprobs(computed))

    def _sample(self, computed: Computed) -> list[SampledToken]:
        step = computed.step
        if not step.samples:
            return []
        logits = self._logits(computed.hidden[computed.batch.sample_index])
        rows = [computed.rows[sample.row] for sample in step.samples]
        sampled = sample(logits, rows, [sample.position for sample in step.samples])
        index = torch.tensor([sample.row for sample in step.samples], device=logits.device)
        self.buffers.last_token[index] = sampled.token_ids.int()
        return [
            SampledToken(s.row, s.generation, token, logprob)
            for s, token, logprob in zip(step.samples, sampled.token_ids.tolist(), sampled.logprobs, strict=True)
        ]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [S, V] of the whole vocabulary."""
        logits = self.model.logits(hidden)
        return self.model.embed.communicator.all_gather(logits)[:, : self.vocab_size]

    def _prompt_logprobs(self, computed: Computed) -> list[PromptLogprobs]:
        results: list[PromptLogprobs] = []
        for scheduled, begin in zip(computed.step.rows, computed.batch.query_start_host, strict=False):
            row = computed.rows[scheduled.row]
            end = min(scheduled.start + scheduled.num_tokens, row.num_prompt - 1)
            if row.params.prompt_logprobs is None or end <= scheduled.start:
                continue
            hidden = computed.hidden[begin : begin + end - scheduled.start]
            targets = torch.from_numpy(row.token_ids[scheduled.start + 1 : end + 1]).long().to(hidden.device)
            logprobs = []
            for at in range(0, len(targets), _LOGITS_AT_ONCE):
                part = slice(at, at + _LOGITS_AT_ONCE)
                asked = [row.params.prompt_logprobs] * len(targets[part])
                logprobs += token_logprobs(self._logits(hidden[part]), targets[part], asked)
            known = [logprob for logprob in logprobs if logprob is not None]
            results.append(PromptLogprobs(scheduled.row, scheduled.generation, scheduled.start + 1, known))
        return results
