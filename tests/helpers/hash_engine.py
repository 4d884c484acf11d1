"""The real engine, scheduler and block manager over the model of hashes in tests/unit, for a process of its own."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from octavo.admission import EngineInfo
from octavo.config import EngineConfig
from octavo.engine.block_manager import KVGroup
from octavo.engine.executor import Capacity
from octavo.engine.loop import Engine
from octavo.engine.scheduler import SchedulerLimits

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
MAX_MODEL_LEN = 96


class Forgetful(list[Any]):
    """Knows how much was put into it, and keeps nothing: a long run must not grow."""

    def __init__(self) -> None:
        super().__init__()
        self._count = 0

    def append(self, item: Any) -> None:
        """Count."""
        self._count += 1

    def __len__(self) -> int:
        return self._count


def start(config: EngineConfig, progress: Callable[[str], None] | None = None) -> tuple[Engine, EngineInfo]:
    """An engine of few blocks, so that requests wait and are preempted."""
    from hash_model import HashExecutor
    from hash_oracle import EOS_TOKEN_IDS, VOCAB_SIZE

    offered = Capacity(
        num_blocks=40,
        block_size=4,
        groups=(KVGroup(),),
        max_model_len=MAX_MODEL_LEN,
        max_requests=6,
        max_tokens=16,
        vocab_size=VOCAB_SIZE,
        max_steps_in_flight=2,
        eos_token_ids=EOS_TOKEN_IDS,
    )
    limits = SchedulerLimits(max_requests=offered.max_requests, max_tokens=offered.max_tokens)
    executor = HashExecutor(offered)
    executor.steps, executor.log = Forgetful(), Forgetful()
    engine = Engine(executor, offered, limits=limits)
    info = EngineInfo(
        model="hashes",
        max_model_len=MAX_MODEL_LEN,
        max_requests=offered.max_requests,
        vocab_size=VOCAB_SIZE,
        num_blocks=offered.num_blocks,
        block_size=offered.block_size,
    )
    return engine, info
