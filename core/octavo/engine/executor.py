"""What the engine asks of whatever computes its steps. Executors are plugins: in process, processes, machines."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from octavo.config import EngineConfig
from octavo.engine.block_manager import KVGroup
from octavo.engine.step import StepInput, StepOutput
from octavo.plugins.registry import Plugins

API = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What the executor offers once its workers are up: the null block is counted in `num_blocks`."""

    num_blocks: int
    block_size: int
    groups: tuple[KVGroup, ...]
    max_model_len: int
    max_requests: int
    max_tokens: int
    vocab_size: int
    max_steps_in_flight: int
    eos_token_ids: frozenset[int]
    details: dict[str, Any] = field(default_factory=dict)


class Executor(Protocol):
    """Computes steps in the order of submission. Built as `Executor(options)`."""

    def start(self, config: EngineConfig, plugins: Plugins, progress: Callable[[str], None]) -> Capacity:
        """Bring up the workers and load the model."""

    def submit(self, step: StepInput) -> object:
        """Compute the model up to the hidden states; returns a handle without waiting."""

    def sample(self, handle: object, masks: object | None = None) -> "Future[StepOutput]":
        """Sample the submitted step's rows; `masks` are the host's constraints for rows that have any."""

    def health(self) -> str | None:
        """None when all workers are well, else one sentence."""

    def shutdown(self) -> None:
        """End the workers and let go of their memory."""
