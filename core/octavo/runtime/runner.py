"""The runner: applies a StepInput to the device's state, runs the model, samples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from octavo.attention.interface import AttentionBackend
from octavo.batch import Batch, BatchShape
from octavo.engine.step import BlockCopy, PromptLogprobs, SampledToken, ScheduledRow, StepInput, StepOutput
from octavo.kv_cache.interface import KVCache
from octavo.models.decoder import Decoder
from octavo.models.layers import StepContext
from octavo.runtime.buffers import BatchBuffers, Prepared, shape_of
from octavo.runtime.failures import named_failures
from octavo.runtime.graphs import Graphs
from octavo.runtime.pending import PendingOutput
from octavo.runtime.rows import Row
from octavo.runtime.sampler import Logprobs, Sampled, sample, token_logprobs
from octavo.runtime.transfer import Arrival, ints_to_device, to_device

LOGITS_AT_ONCE = 128  # rows of prompt logits held at a time
COUNTED_STEPS = 16  # of these steps of decodes one brings the cache's counts: a copy takes a hundredth of such a step


@dataclass(frozen=True, slots=True)
class Computed:
    """A step between `submit` and `sample`: what it asked, its batch and its hidden states.

    `hidden` is of all tokens [T, H], or where `sampled_only` of those whose logits are sampled, [S, H].
    """

    step: StepInput
    prepared: Prepared
    hidden: torch.Tensor
    rows: dict[int, Row]
    graph: BatchShape | None
    """The shape of the graph that computed it."""
    sampled_only: bool

    @property
    def is_greedy(self) -> bool:
        """Whether it is a graph of decodes in which each request samples its own likeliest token."""
        step, shape = self.step, self.graph
        if shape is None or shape.num_decodes < shape.num_requests or len(step.samples) != len(step.rows):
            return False
        rows = [row.row for row in step.rows]
        if rows != [one.row for one in step.samples] or rows != [one.source for one in step.samples]:
            return False
        return all([self.rows[row].plain for row in rows])

    @property
    def batch(self) -> Batch:
        """The step's batch."""
        return self.prepared.batch


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
        graphs: Graphs | None = None,
    ) -> None:
        self.model = model
        self.backends = backends
        self.caches = caches
        self.layer_groups = layer_groups
        self.buffers = buffers
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.provider_names = provider_names
        self.graphs = graphs
        self.rows: dict[int, Row] = {}
        self.kv_counts = caches[0].counts if caches else None
        self._uncounted_steps = 0

    @torch.inference_mode()
    def submit(self, step: StepInput) -> Computed:
        """Take over the step's changes and compute its hidden states. Raises StepError."""
        self._apply(step)
        graphs = self.graphs
        shape = graphs.find(shape_of(step)) if graphs else None
        prepared = self.buffers.prepare(step, self.rows, shape)
        with named_failures(self.provider_names, self.model.layers, prepared.batch.shape):
            sampled_only = shape is None and self._wants_few(step)
            forward = self._plan(prepared.batch, prepared.batch.sample_index if sampled_only else None)
            hidden = graphs.replay(shape) if graphs and shape else forward()
        return Computed(step, prepared, hidden, dict(self.rows), shape, sampled_only)

    def _wants_few(self, step: StepInput) -> bool:
        """Whether most tokens only leave their keys and values: prompts, whose logprobs nobody asked for."""
        if not 0 < len(step.samples) < step.num_tokens:
            return False
        return all(self.rows[row.row].params.prompt_logprobs is None for row in step.rows)

    def _plan(self, batch: Batch, wanted: torch.Tensor | None = None) -> Callable[[], torch.Tensor]:
        """Have every backend plan for the batch; what remains to be done."""
        plans: tuple[Any, ...] = tuple(backend.plan(batch) for backend in self.backends)
        return lambda: self.model.forward(StepContext(batch, plans, self.caches, wanted))

    @torch.inference_mode()
    def run_padding(self, shape: BatchShape) -> torch.Tensor:
        """Compute a batch of padding: what a step of this shape needs is then compiled and allocated."""
        return self._plan(self.buffers.padding(shape))()

    @torch.inference_mode()
    def capture(self, shape: BatchShape) -> None:
        """Add a graph for batches of `shape`."""
        assert self.graphs is not None, "a runner without graphs"
        batch = self.buffers.padding(shape)
        self.graphs.capture(shape, self._plan(batch), lambda hidden: self._take_likeliest(hidden, batch.row_index))

    def _take_likeliest(self, hidden: torch.Tensor, row_index: torch.Tensor) -> torch.Tensor:
        """The likeliest token of each row, [R] int64: its next input."""
        token_ids = self.logits(hidden).max(dim=-1).indices
        self.buffers.last_token.index_copy_(0, row_index.long(), token_ids.int())
        return token_ids

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
            sources = ints_to_device([copy.source for copy in mine], self.buffers.device)
            targets = ints_to_device([copy.target for copy in mine], self.buffers.device)
            for cache, layer_group in zip(self.caches, self.layer_groups, strict=True):
                if layer_group == group:
                    cache.raw.index_copy_(0, targets, cache.raw.index_select(0, sources))

    @torch.inference_mode()
    def sample(self, computed: Computed) -> PendingOutput:
        """Sample the step's rows, and leave each one's token on the device as its next input. Raises StepError."""
        with named_failures(self.provider_names, (), computed.batch.shape):
            tokens, prompts = self._sample(computed), self._prompt_logprobs(computed)
            counts = self._send_counts(computed.batch.shape)
        step_id, shape = computed.step.step_id, computed.batch.shape  # all that is kept: the hidden states are let go

        def finish() -> StepOutput:
            with named_failures(self.provider_names, (), shape):
                output = StepOutput(step_id, tokens(), [prompt() for prompt in prompts])
                return output if counts is None else replace(output, kv_counts=tuple(counts.tensors()[0].tolist()))

        return PendingOutput(finish)

    def _send_counts(self, shape: BatchShape) -> Arrival | None:
        """The cache's counts on their way to the host, where the cache counts and the step is long or one is due."""
        if self.kv_counts is None:
            return None
        self._uncounted_steps += 1
        decodes = shape.num_decodes == shape.num_requests
        if decodes and self.kv_counts.is_cuda and self._uncounted_steps < COUNTED_STEPS:
            return None
        self._uncounted_steps = 0
        return Arrival(self.kv_counts.clone())

    def _sample(self, computed: Computed) -> Callable[[], list[SampledToken]]:
        samples = computed.step.samples
        if not samples:
            return list
        if self.graphs and computed.graph and computed.is_greedy:
            sampled = Sampled(self.graphs.replay_greedy(computed.graph)[: len(samples)], None)
        else:
            hidden = computed.hidden
            if not computed.sampled_only:
                hidden = hidden.index_select(0, computed.batch.sample_index)
            logits = self.logits(hidden)
            rows = [computed.rows[sample.row] for sample in samples]
            sampled = sample(logits, rows, [sample.position for sample in samples])
            self.buffers.last_token.index_copy_(0, computed.prepared.sample_rows, sampled.token_ids.int())
        arrival = Arrival(sampled.token_ids)

        def tokens() -> list[SampledToken]:
            logprobs = sampled.logprobs.wait() if sampled.logprobs else [None] * len(samples)
            ids = arrival.tensors()[0].tolist()
            return [
                SampledToken(s.row, s.generation, token, logprob)
                for s, token, logprob in zip(samples, ids, logprobs, strict=True)
            ]

        return tokens

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [S, V] of the whole vocabulary."""
        logits = self.model.logits(hidden)
        return self.model.embed.communicator.all_gather(logits)[:, : self.vocab_size]

    def _prompt_logprobs(self, computed: Computed) -> list[Callable[[], PromptLogprobs]]:
        results: list[Callable[[], PromptLogprobs]] = []
        for scheduled, begin in zip(computed.step.rows, computed.batch.query_start_host, strict=False):
            row = computed.rows[scheduled.row]
            if row.params.prompt_logprobs is None:
                continue
            end = min(scheduled.start + scheduled.num_tokens, row.num_prompt - 1)
            if end > scheduled.start:
                hidden = computed.hidden[begin : begin + end - scheduled.start]
                parts = self._logprobs_of(hidden, row, scheduled.start + 1, end + 1)
                results.append(partial(_finish_prompt, scheduled, parts))
        return results

    def _logprobs_of(self, hidden: torch.Tensor, row: Row, start: int, end: int) -> list[Logprobs]:
        """Logprobs of the prompt's tokens from `start` to `end`, from the hidden states [n, H] before them."""
        targets = to_device(row.token_ids[start:end], hidden.device).long()
        parts = []
        for at in range(0, len(targets), LOGITS_AT_ONCE):
            part = slice(at, at + LOGITS_AT_ONCE)
            asked = [row.params.prompt_logprobs] * len(targets[part])
            parts.append(token_logprobs(self.logits(hidden[part]), targets[part], asked))
        return [part for part in parts if part is not None]


def _finish_prompt(scheduled: ScheduledRow, parts: list[Logprobs]) -> PromptLogprobs:
    known = [logprob for part in parts for logprob in part.wait() if logprob is not None]
    return PromptLogprobs(scheduled.row, scheduled.generation, scheduled.start + 1, known)
