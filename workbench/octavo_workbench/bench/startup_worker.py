"""A process of `octavo bench startup`: starts an engine, generates one token, and says what each phase took.

Times are read off the clock that the parent's are read off (CLOCK_MONOTONIC, which all processes share).
"""

import time

_LOADED = time.perf_counter()

import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from typing import Any  # noqa: E402


def phases_of(begin: float, loaded: float, config: dict[str, Any]) -> dict[str, float]:
    """Start an engine: seconds of each phase since `begin`, when the process was asked for. Ends it again."""
    from octavo.config import EngineConfig
    from octavo.sampling_params import SamplingParams
    from octavo.start import start_engine

    import_begin = time.perf_counter()
    import octavo.runtime.worker  # noqa: F401  torch and all that serving imports

    imported = time.perf_counter()
    engine, info = start_engine(EngineConfig.from_kwargs(**config))
    ready = time.perf_counter()
    engine.add_request("first", [10, 11, 12], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
    while engine.has_work():
        engine.step()
    first_token = time.perf_counter() - ready
    engine.shutdown()
    phases = {"starting Python": loaded - begin, "imports": imported - import_begin, **info.startup_seconds}
    phases["other"] = max(0.0, ready - begin - sum(phases.values()))
    return {**phases, "ready": ready - begin, "first token after it": first_token}


def main() -> None:
    """Answer the one question on standard input; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from octavo.errors import OctavoError

    question = json.load(sys.stdin)
    try:
        answer: dict[str, Any] = {"phases": phases_of(question["begin"], _LOADED, question["config"])}
    except OctavoError as error:
        answer = {"error": str(error)}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
