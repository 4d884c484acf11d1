"""The executor that computes in the engine's own process."""

from collections.abc import Callable
from concurrent.futures import Future

from octavo.config import EngineConfig
from octavo.engine.executor import Capacity
from octavo.engine.step import StepInput, StepOutput
from octavo.plugins.registry import Plugins
from octavo.runtime.runner import Computed, Runner
from octavo.runtime.worker import start_worker


class InProcessExecutor:
    """One rank, on the calling thread. On a CPU a step is computed when it is submitted, on a GPU behind it."""

    @staticmethod
    def why_not(spec: int, options: object) -> str | None:
        """Serves one rank; `spec` is the number of ranks."""
        return None if spec == 1 else f"the executor 'uni' runs 1 rank, not {spec}"

    def __init__(self, options: object = None) -> None:
        self._runner: Runner | None = None

    def start(self, config: EngineConfig, plugins: Plugins, progress: Callable[[str], None]) -> Capacity:
        """Load the model, size and allocate the KV cache."""
        worker = start_worker(config, plugins, progress)
        self._runner = worker.runner
        return worker.capacity

    @property
    def runner(self) -> Runner:
        """The started runner."""
        assert self._runner is not None, "the executor has not been started"
        return self._runner

    def submit(self, step: StepInput) -> Computed:
        """Compute the step's hidden states."""
        return self.runner.submit(step)

    def sample(self, handle: object, masks: object | None = None) -> "Future[StepOutput]":
        """Sample a submitted step."""
        assert isinstance(handle, Computed)
        return self.runner.sample(handle)

    def health(self) -> str | None:
        """A process that answers is well."""
        return None

    def shutdown(self) -> None:
        """Let go of the model and its caches."""
        self._runner = None
