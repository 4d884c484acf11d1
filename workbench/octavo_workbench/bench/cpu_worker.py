"""One side of `octavo bench cpu`, in a process of its own: `python -m octavo_workbench.bench.cpu_worker SIDE`.

A line of JSON comes in for each turn, and one goes out when it is over. Between turns the process waits and computes
nothing.
"""

import contextlib
import json
import os
import resource
import sys
import time
from dataclasses import asdict
from typing import Any, Protocol, TextIO

from octavo.config import EngineConfig
from octavo.errors import CheckpointError, OctavoError, StepError

_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


class Side(Protocol):
    """An engine that is compared."""

    num_threads: int

    def generate(self, prompts: list[list[int]], num_output_tokens: int) -> list[list[int]]:
        """Complete all prompts at once, greedily and past any end of sequence: the new token ids of each."""


class OctavoSide:
    """Our offline engine, text included: what `LLM.generate` costs."""

    def __init__(self, config: EngineConfig) -> None:
        import torch
        from octavo.llm import LLM

        self._llm = LLM(**asdict(config))
        self.num_threads = torch.get_num_threads()

    def generate(self, prompts: list[list[int]], num_output_tokens: int) -> list[list[int]]:
        """As Side says."""
        from octavo.sampling_params import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=num_output_tokens, ignore_eos=True)
        return [output.outputs[0].token_ids for output in self._llm.generate(prompts, params, use_tqdm=False)]


class TransformersSide:
    """transformers' `generate` on the same checkpoint, the prompts as one static batch."""

    def __init__(self, config: EngineConfig) -> None:
        import torch
        import transformers
        from octavo.checkpoints import load_tokenizer

        path = load_tokenizer(config)[0]
        if not path.is_dir():
            raise CheckpointError(f"{path} is a file, but transformers reads directories: name an HF directory.")
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self.num_threads = torch.get_num_threads()
        transformers.utils.logging.disable_progress_bar()
        dtype = getattr(torch, config.dtype)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        # Generation is by length alone, and greedy whatever the checkpoint's own settings are.
        self._model.generation_config = transformers.GenerationConfig(do_sample=False)

    def generate(self, prompts: list[list[int]], num_output_tokens: int) -> list[list[int]]:
        """As Side says."""
        import torch

        token_ids = torch.tensor(prompts)
        output = self._model.generate(
            token_ids, attention_mask=torch.ones_like(token_ids), max_new_tokens=num_output_tokens
        )
        return output[:, token_ids.shape[1] :].tolist()  # type: ignore[no-any-return]


SIDES: dict[str, type[OctavoSide] | type[TransformersSide]] = {"octavo": OctavoSide, "transformers": TransformersSide}


def peak_bytes() -> int:
    """The most memory that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT


def turn(side: Side, prompts: list[list[int]], num_output_tokens: int) -> dict[str, Any]:
    """Generate, and what it took. Raises StepError unless every prompt got all its tokens."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    token_ids = side.generate(prompts, num_output_tokens)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    lengths = {len(one) for one in token_ids}
    if len(token_ids) != len(prompts) or lengths != {num_output_tokens}:
        raise StepError(
            f"{len(prompts)} prompts should have got {num_output_tokens} tokens each, but there are "
            f"{len(token_ids)} answers of {sorted(lengths)} tokens."
        )
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "token_ids": token_ids, "peak_bytes": peak_bytes()}


def serve(name: str, commands: TextIO, answers: TextIO) -> None:
    """Start the side that the first line configures, then take turns until there are no more lines."""

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        side: Side = SIDES[name](EngineConfig.from_kwargs(**json.loads(commands.readline())))
        answer({"num_threads": side.num_threads})
        idle_since = time.process_time()
        for line in commands:
            idle_cpu_seconds = time.process_time() - idle_since
            answer({**turn(side, **json.loads(line)), "idle_cpu_seconds": idle_cpu_seconds})
            idle_since = time.process_time()
    except OctavoError as error:
        answer({"error": str(error)})


def main() -> None:
    """Serve over standard input and output; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C reaches both sides; the benchmark says so
        serve(sys.argv[1], sys.stdin, answers)


if __name__ == "__main__":
    main()
