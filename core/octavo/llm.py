"""Offline inference: the engine in this process, no boundary."""

import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from tqdm import tqdm

from octavo.admission import EngineInfo, check_request, sampling_defaults
from octavo.config import EngineConfig
from octavo.errors import RequestError
from octavo.output_processor import OutputProcessor
from octavo.outputs import RequestOutput
from octavo.sampling_params import SamplingParams
from octavo.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from octavo.engine.loop import Engine

Prompt = str | list[int] | Mapping[str, Any]
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Job:
    prompt: str | None
    token_ids: list[int]
    params: SamplingParams


class LLM:
    """An engine and its tokenizer in this process. `LLM()` is the default model; other arguments are EngineConfig's.

    Raises ConfigError, PluginError or CheckpointError when the engine cannot start.
    """

    def __init__(self, model: str = "", **engine_args: Any) -> None:
        from octavo.checkpoints import load_tokenizer
        from octavo.start import start_engine

        config = EngineConfig.from_kwargs(model=model, **engine_args)
        engine, info = start_engine(config)
        self._set_up(config, engine, info, load_tokenizer(config)[1])

    @classmethod
    def from_engine(cls, config: EngineConfig, engine: "Engine", info: EngineInfo, tokenizer: Tokenizer) -> Self:
        """An LLM over an engine that is already started."""
        llm = cls.__new__(cls)
        llm._set_up(config, engine, info, tokenizer)
        return llm

    def _set_up(self, config: EngineConfig, engine: "Engine", info: EngineInfo, tokenizer: Tokenizer) -> None:
        self.config = config
        self.engine = engine
        self.info = info
        self._tokenizer = tokenizer
        self._numbers = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete each prompt: text, token ids, or a dict with `prompt` or `prompt_token_ids`. Answers keep the order.

        Without sampling parameters the model's own apply. Raises RequestError, before anything runs, when one request
        cannot be served.
        """
        given = [self._tokens(prompt) for prompt in _as_list(prompts)]
        return self._run(self._jobs(given, sampling_params), use_tqdm)

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, a list of `{"role": ..., "content": ...}`, or a list of them; else as `generate`."""
        conversations: Any = [messages] if messages and isinstance(messages[0], dict) else messages
        template = dict(chat_template_kwargs or {})
        given = [
            (None, self._tokenizer.encode_chat(one, add_generation_prompt=add_generation_prompt, **template))
            for one in conversations
        ]
        return self._run(self._jobs(given, sampling_params), use_tqdm)

    def default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when it is given no parameters: the model's generation_config, unless that is off."""
        asked = self.config.generation_config == "auto"
        return SamplingParams(**(sampling_defaults(self.info.generation_config) if asked else {}))

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False, with nothing changed, while requests run."""
        return self.engine.reset_prefix_cache()

    def shutdown(self) -> None:
        """End the engine and free what it holds."""
        self.engine.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _tokens(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            prompt = _from_dict(prompt)
        if isinstance(prompt, str):
            return prompt, self._tokenizer.encode(prompt)
        return None, list(prompt)

    def _jobs(
        self,
        given: Sequence[tuple[str | None, list[int]]],
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[_Job]:
        params = self.default_sampling_params() if params is None else params
        each = [params] * len(given) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(given):
            raise RequestError(f"There are {len(given)} prompts, but {len(each)} sampling_params.", "sampling_params")
        jobs = [_Job(text, token_ids, one) for (text, token_ids), one in zip(given, each, strict=True)]
        for job in jobs:
            check_request(
                job.token_ids,
                job.params,
                max_model_len=self.info.max_model_len,
                vocab_size=self.info.vocab_size,
                max_logprobs=self.config.max_logprobs,
            )
        return jobs

    def _run(self, jobs: Sequence[_Job], use_tqdm: bool) -> list[RequestOutput]:
        processors: dict[str, OutputProcessor] = {}
        with _progress(len(jobs), use_tqdm) as bar, _interrupts_between_steps() as release:
            try:
                for job in jobs:
                    self._add(job, processors)
                while any(not p.finished for p in processors.values()):
                    self._step(processors, bar)
                    release()
            finally:
                for request_id, processor in processors.items():
                    if not processor.finished:
                        self.engine.abort(request_id)
        return [processor.output for processor in processors.values()]

    def _add(self, job: _Job, processors: dict[str, OutputProcessor]) -> None:
        request_id = str(next(self._numbers))
        self.engine.add_request(request_id, job.token_ids, job.params)
        processors[request_id] = OutputProcessor(request_id, job.prompt, job.token_ids, job.params, self._tokenizer)

    def _step(self, processors: dict[str, OutputProcessor], bar: "_Progress") -> None:
        for event in self.engine.step():
            processor = processors.get(event.request_id)
            if processor is None or (delta := processor.push(event)) is None:
                continue
            if delta.abort:
                self.engine.abort(event.request_id, delta.index)
            bar.advance(len(delta.token_ids), int(processor.finished))


class _Progress:
    """Finished requests as a bar, with generated tokens per second."""

    def __init__(self, bar: "tqdm[Any]") -> None:
        self._bar = bar
        self._begin = time.perf_counter()
        self._num_tokens = 0

    def advance(self, num_tokens: int, num_finished: int) -> None:
        self._num_tokens += num_tokens
        if num_finished:
            rate = self._num_tokens / (time.perf_counter() - self._begin)
            self._bar.set_postfix_str(f"{rate:.1f} tokens/s", refresh=False)
            self._bar.update(num_finished)


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[_Progress]:
    with tqdm(total=total, desc="Generating", unit="request", disable=not shown, dynamic_ncols=True) as bar:
        yield _Progress(bar)


@contextmanager
def _interrupts_between_steps() -> Iterator[Callable[[], None]]:
    """Holds Ctrl-C back until the function that it yields is called: an exception in a step would leave it half done.

    A second Ctrl-C counts at once, for a step that does not end.
    """
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield lambda: None
        return
    held: list[tuple[int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append((number, frame))
        if len(held) > 1:
            usual(number, frame)

    def release() -> None:
        if held:
            usual(*held.pop())

    signal.signal(signal.SIGINT, hold)
    try:
        yield release
    finally:
        signal.signal(signal.SIGINT, usual)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if prompts and all(isinstance(p, int) for p in prompts):
        return [list(prompts)]  # type: ignore[arg-type]
    return prompts  # type: ignore[return-value]


def _from_dict(prompt: Mapping[str, Any]) -> str | list[int]:
    for name in ("prompt_token_ids", "prompt"):
        if prompt.get(name) is not None:
            value: str | list[int] = prompt[name]
            return value
    raise RequestError(f"A prompt dict must hold 'prompt' or 'prompt_token_ids', but holds {sorted(prompt)}.", "prompt")
