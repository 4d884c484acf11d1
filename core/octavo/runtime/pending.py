"""A step's output on its way from the device: fetched by whoever asks for it, so that nobody else waits."""

from collections.abc import Callable
from concurrent.futures import Future

from octavo.engine.step import StepOutput


class PendingOutput(Future[StepOutput]):
    """A future that the caller of `result` completes: `finish` waits for the device and makes the output."""

    def __init__(self, finish: Callable[[], StepOutput]) -> None:
        super().__init__()
        self._finish = finish

    def result(self, timeout: float | None = None) -> StepOutput:
        """The output. Raises what computing it raised; a device's own limits stand in for `timeout`."""
        if not self.done():
            try:
                self.set_result(self._finish())
            except Exception as error:
                self.set_exception(error)
        return super().result(timeout)
