"""The runner: applies a StepInput to the device's state, runs the model, samples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from octavo.attention.interface import AttentionBackend, plan_on_device
from octavo.batch import Batch, BatchShape
from octavo.engine.step import BlockCopy, PromptLogprobs, StepInput, StepOutput, TokenLogprob
from octavo.kv_cache.interface import KVCache
from octavo.models.decoder import Decoder, DecoderLayer
from octavo.models.layers import StepContext, Wanted
from octavo.runtime.buffers import BatchBuffers, Prepared, shape_of
from octavo.runtime.failures import named_failures
from octavo.runtime.graphs import Graphs
from octavo.runtime.pending import PendingOutput
from octavo.runtime.rows import Row, RowTable
from octavo.runtime.sampler import Logprobs, Sampled, sample, token_logprobs
from octavo.runtime.sizes import roomy
from octavo.runtime.transfer import Arrival, ints_to_device, to_device

LOGITS_AT_ONCE = 128  # rows of prompt logits held at a time
COUNTED_STEPS = 16  # of these steps of decodes one brings the cache's counts: a copy takes a hundredth of such a step


@dataclass(frozen=True, slots=True)
class Computed:
    """A step between `submit` and `sample`: what it asked, its batch and its hidden states.

    `hidden` is of all tokens [T, H], or where `sampled_only` of those in `batch.sample_index`, [S, H].
    """

    step: StepInput
    prepared: Prepared
    hidden: torch.Tensor
    greedy_graph: BatchShape | None
    """The shape of the graph that samples it as well."""
    sampled_only: bool

    @property
    def batch(self) -> Batch:
        """The step's batch."""
        return self.prepared.batch


def is_greedy(step: StepInput, graph: BatchShape | None, rows: RowTable) -> bool:
    """Whether it runs in a graph of decodes, and each request samples its own likeliest token and nothing more."""
    if graph is None or graph.num_decodes < graph.num_requests:
        return False
    computed, samples = step.rows.row, step.samples
    return samples.row == computed and samples.source == computed and bool(rows.plain[computed].all())


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
        self.plans_on_device = plan_on_device(backends)
        self.rows = RowTable(buffers.padding_row)
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
            if graphs is None or shape is None:
                hidden = self._plan(prepared, step if sampled_only else None)()
            else:
                if not self.plans_on_device:
                    self._plan(prepared)
                hidden = graphs.replay(shape)
        return Computed(step, prepared, hidden, shape if is_greedy(step, shape, self.rows) else None, sampled_only)

    def _wants_few(self, step: StepInput) -> bool:
        """Whether most tokens only leave their keys and values: prompts, whose logprobs nobody asked for."""
        return 0 < len(step.samples.row) < step.num_tokens and self.rows.telling.isdisjoint(step.rows.row)

    def _plan(self, prepared: Prepared, ending: StepInput | None = None) -> Callable[[], torch.Tensor]:
        """Have every backend plan for the batch; what remains to be done, to the end for the samples of `ending` alone.

        That is None where every token is wanted.
        """
        batch = prepared.batch
        plans = self._plans_of(batch)

        def forward() -> torch.Tensor:
            self.buffers.take_sampled(prepared)
            wanted = None if ending is None else Wanted(batch.sample_index, self.buffers.ends(ending, batch))
            return self.model.forward(StepContext(batch, plans, self.caches, wanted))

        return forward

    def _plans_of(self, batch: Batch) -> tuple[Any, ...]:
        self.buffers.gather(batch)
        return tuple(backend.plan(batch) for backend in self.backends)

    @torch.inference_mode()
    def run_padding(self, shape: BatchShape) -> torch.Tensor:
        """Compute a batch of padding: what a step of this shape needs is then compiled and allocated."""
        return self._plan(self.buffers.padding(shape))()

    @torch.inference_mode()
    def run_layer(self, layer: DecoderLayer, num_tokens: int) -> None:
        """Compute one layer of a batch of padding."""
        batch = self.buffers.padding(BatchShape(num_tokens, 1, num_tokens, 0)).batch
        layer(self.model.embed(batch.token_ids), None, StepContext(batch, self._plans_of(batch), self.caches))

    @torch.inference_mode()
    def capture(self, shape: BatchShape) -> None:
        """Add a graph for batches of `shape`."""
        assert self.graphs is not None, "a runner without graphs"
        prepared = self.buffers.padding(shape)
        rows = prepared.batch.row_index
        forward = (lambda: self._plan(prepared)()) if self.plans_on_device else self._plan(prepared)
        self.graphs.capture(shape, forward, lambda hidden: self._take_likeliest(hidden, rows))

    def _take_likeliest(self, hidden: torch.Tensor, row_index: torch.Tensor) -> torch.Tensor:
        """The likeliest token of each row, [R] int64: its next input."""
        token_ids = self.logits(hidden).max(dim=-1).indices
        self.buffers.last_token.index_copy_(0, row_index.long(), token_ids.int())
        return token_ids

    def _apply(self, step: StepInput) -> None:
        buffers = self.buffers
        for row in step.freed_rows:
            self.rows.drop(row)
        for new in step.new_rows:
            self.rows.put(new.row, Row.start(new, self.vocab_size, self.eos_token_ids, buffers.device))
            for group, blocks in enumerate(new.blocks):
                buffers.set_table(group, new.row, 0, blocks)
        for fork in step.forks:
            self.rows.put(fork.row, self.rows[fork.source].fork(fork))
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
            take, prompts = self._sample(computed), self._prompt_logprobs(computed)
            counts = self._send_counts(computed.batch.shape)
        step_id, shape = computed.step.step_id, computed.batch.shape  # all that is kept: the hidden states are let go

        def finish() -> StepOutput:
            with named_failures(self.provider_names, (), shape):
                output = StepOutput(step_id, *take(), [prompt() for prompt in prompts])
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

    def _sample(self, computed: Computed) -> Callable[[], tuple[list[int], list[TokenLogprob | None]]]:
        """Sample; what waits for the tokens and for their logprobs, none where nobody asked for any."""
        samples = computed.step.samples
        if not len(samples.row):
            return lambda: ([], [])
        if self.graphs and computed.greedy_graph:
            sampled = Sampled(self.graphs.replay_greedy(computed.greedy_graph)[: len(samples.row)], None)
        else:
            hidden = computed.hidden
            if not computed.sampled_only:
                hidden = hidden.index_select(0, computed.batch.sample_index)
            rows = [self.rows[row] for row in samples.row]
            sampled = sample(self.logits(hidden)[: len(rows)], rows, samples.position)
            self.buffers.last_token.index_copy_(0, computed.prepared.sample_rows, sampled.token_ids.int())
        arrival, logprobs = Arrival(sampled.token_ids), sampled.logprobs
        return lambda: (arrival.tensors()[0].tolist(), logprobs.wait() if logprobs else [])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [S, V] of the whole vocabulary for hidden states [S, H]."""
        number = len(hidden)
        if hidden.is_cuda and (room := roomy(number)) > number:
            hidden = torch.nn.functional.pad(hidden, (0, 0, 0, room - number))
        logits = self.model.logits(hidden)[:number]
        return self.model.embed.communicator.all_gather(logits)[:, : self.vocab_size]

    def _prompt_logprobs(self, computed: Computed) -> list[Callable[[], PromptLogprobs]]:
        results: list[Callable[[], PromptLogprobs]] = []
        rows = computed.step.rows
        if not self.rows.telling:
            return results
        for index in [i for i, row in enumerate(rows.row) if row in self.rows.telling]:
            row, start, begin = self.rows[rows.row[index]], rows.start[index], computed.batch.query_start_host[index]
            end = min(start + rows.num_tokens[index], row.num_prompt - 1)
            if end > start:
                parts = self._logprobs_of(computed.hidden[begin : begin + end - start], row, start + 1, end + 1)
                results.append(partial(_finish_prompt, index, start + 1, parts))
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


def _finish_prompt(index: int, start: int, parts: list[Logprobs]) -> PromptLogprobs:
    return PromptLogprobs(index, start, [one for part in parts for one in part.wait() if one is not None])
