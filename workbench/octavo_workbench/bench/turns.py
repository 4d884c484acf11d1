"""The sides of `octavo bench cpu` as processes that take turns: while one runs the others wait."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from octavo.config import EngineConfig
from octavo.errors import EngineDeadError, OctavoError

_END_SECONDS = 10.0
_STEAL = 8  # of /proc/stat's columns: user nice system idle iowait irq softirq steal
_IDLE = (3, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a side's turn took. `idle_cpu_seconds` is what it computed while it should have waited for the turn."""

    seconds: float
    cpu_seconds: float
    idle_cpu_seconds: float
    peak_bytes: int
    token_ids: list[list[int]]

    @property
    def output_tokens_per_s(self) -> float:
        """Generated tokens per second, prefill included."""
        return sum(map(len, self.token_ids)) / self.seconds


class SideProcess:
    """A side in a process of its own. `ready_seconds` is the time from its start until it can generate.

    Raises EngineDeadError when the process ends, OctavoError with its words when it refuses.
    """

    def __init__(self, name: str, config: EngineConfig) -> None:
        self.name = name
        begin = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "octavo_workbench.bench.cpu_worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        try:
            self.num_threads: int = self._ask(asdict(config))["num_threads"]
        except BaseException:
            self.close()
            raise
        self.ready_seconds = time.perf_counter() - begin

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take_turn(self, prompts: list[list[int]], num_output_tokens: int) -> Turn:
        """Generate `num_output_tokens` for each of the prompts, all at once."""
        return Turn(**self._ask({"prompts": prompts, "num_output_tokens": num_output_tokens}))

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):  # it has ended, which the missing answer tells
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise EngineDeadError(f"The process of the side '{self.name}' ended with code {code}; see its words above.")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise OctavoError(f"The side '{self.name}' cannot run: {answer['error']}")
        return answer

    def close(self) -> None:
        """Let the process end, and end it if it does not."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class OtherLoad:
    """How much of the machine's CPU time goes to others meanwhile; unknown where there is no /proc/stat."""

    def __init__(self) -> None:
        self._begin, self._busy, self._own = time.perf_counter(), _busy_seconds(), _own_seconds()

    def share(self) -> float | None:
        """The part of all CPUs, 0 to 1, that since the construction neither idled nor served us.

        To be asked for once the processes that we started have ended: the system counts them then.
        """
        busy, seconds = _busy_seconds(), time.perf_counter() - self._begin
        if busy is None or self._busy is None:
            return None
        others = (busy - self._busy) - (_own_seconds() - self._own)
        return max(0.0, others) / (seconds * (os.cpu_count() or 1))


def _own_seconds() -> float:
    """CPU seconds of this process and of those that it started, so far as they have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _busy_seconds() -> float | None:
    """Seconds that the machine's CPUs have been busy, or taken by other machines, since it started."""
    try:
        columns = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1 : _STEAL + 1]
    except (OSError, IndexError):
        return None
    ticks = sum(int(ticks) for column, ticks in enumerate(columns) if column not in _IDLE)
    return ticks / os.sysconf("SC_CLK_TCK")
