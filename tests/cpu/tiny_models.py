"""Tiny random models in transformers' own classes, what those generate, and the engine driven step by step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from octavo.config import EngineConfig
from octavo.engine.loop import Engine
from octavo.engine.step import TokenEvent, TokenLogprob
from octavo.sampling_params import SamplingParams
from octavo.start import start_engine
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 512
MAX_MODEL_LEN = 192
NUM_TOKENS = 64
WINDOW = 24
PROMPT_LENS = (1, 2, 5, 7, 8, 15, 16, 17, 23, 31, 40, 57, 64, 77, 96, 110)
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_USUAL: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": MAX_MODEL_LEN,
    "max_num_seqs": 32,
    "num_threads": 1,  # what is so small gains nothing from a second thread
    "plugins": (),
    "progress": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_BIASED = {
    "attention_bias": True,
    "mlp_bias": True,
    "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
}


def _llama(**config: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_SHAPE | config))


def _mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**_SHAPE, sliding_window=WINDOW, head_dim=16))


def _qwen2() -> PreTrainedModel:
    windows = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
    return Qwen2ForCausalLM(Qwen2Config(**_SHAPE | {"num_hidden_layers": 4} | windows))


def _qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=32))


MODELS: Mapping[str, tuple[Callable[[], PreTrainedModel], int]] = {
    "llama": (_llama, 3),
    "llama-rope-scaled-tied": (lambda: _llama(rope_parameters=_LLAMA3, tie_word_embeddings=True), 1),
    "llama-biased": (lambda: _llama(**_BIASED), 10),
    "mistral-window": (_mistral, 1),
    "qwen2-two-groups": (_qwen2, 2),
    "qwen3": (_qwen3, 1),
}
"""Each model with a seed that leaves no greedy token to a rounding error."""


def build(name: str) -> PreTrainedModel:
    """The model with random weights, spread so widely that its greedy tokens vary and each weight matters."""
    make, seed = MODELS[name]
    torch.manual_seed(seed)
    model = make().float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(std=0.3 if parameter.dim() == 1 else 0.2)
            if "norm" in parameter_name:
                parameter.add_(1.0)
    return model


def prompts_of(seed: int = 0) -> list[list[int]]:
    """16 random prompts of PROMPT_LENS; the last four share their first 48 tokens."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(1, VOCAB_SIZE, (n,), generator=generator).tolist() for n in PROMPT_LENS]
    return [*prompts[:-4], *(prompts[-1][:48] + prompt[48:] for prompt in prompts[-4:])]


@dataclass(frozen=True)
class Reference:
    """A model on disk, prompts, and the greedy tokens of transformers; `clear` is the least lead of a token's logit."""

    name: str
    path: Path
    prompts: list[list[int]]
    tokens: list[list[int]]
    clear: float


def make_reference(name: str, directory: Path) -> Reference:
    """Save the model in `directory` and generate with it."""
    torch.set_num_threads(1)
    model = build(name)
    model.save_pretrained(directory)
    prompts = prompts_of()
    tokens, clear = generate(model, prompts, NUM_TOKENS)
    return Reference(name, directory, prompts, tokens, clear)


def generate(model: PreTrainedModel, prompts: Sequence[list[int]], num_tokens: int) -> tuple[list[list[int]], float]:
    """Greedy tokens of transformers' `generate`, all prompts at once, and the least lead of a chosen token's logit."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    token_ids = torch.tensor([[0] * n + prompt for n, prompt in zip(padding, prompts, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
    model.generation_config.eos_token_id = None  # all of them go on to the end
    output = model.generate(
        token_ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=num_tokens,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(output.logits).float().topk(2, dim=-1).values
    return output.sequences[:, longest:].tolist(), (best[..., 0] - best[..., 1]).min().item()


@dataclass
class Answer:
    """All events of one choice put together."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached: int = 0
    error: str | None = None

    def add(self, event: TokenEvent) -> None:
        """Take one event."""
        assert self.finish_reason is None, "an event after the end"
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs
        self.prompt_logprobs += event.prompt_logprobs
        self.finish_reason, self.stop_reason = event.finish_reason, event.stop_reason
        self.num_cached = event.num_cached_tokens or self.num_cached
        self.error = event.error


def start(path: Path | str, **options: Any) -> Engine:
    """An engine in float32 with room for MAX_MODEL_LEN tokens a request, unless `options` say otherwise."""
    return start_engine(EngineConfig.from_kwargs(model=str(path), **_USUAL | options))[0]


def run_choices(
    engine: Engine, prompts: Sequence[list[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[list[Answer]]:
    """Every choice of every prompt, all prompts queued at once."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    answers: dict[str, list[Answer]] = {}
    for i, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
        engine.add_request(str(i), prompt, own)
        answers[str(i)] = [Answer() for _ in range(own.n)]
    while engine.has_work():
        for event in engine.step():
            answers[event.request_id][event.choice].add(event)
    assert all(choice.finish_reason for choices in answers.values() for choice in choices)
    return list(answers.values())


def run(
    engine: Engine, prompts: Sequence[list[int]], params: SamplingParams | Sequence[SamplingParams] = GREEDY
) -> list[Answer]:
    """The first choice of every prompt, all prompts queued at once."""
    return [choices[0] for choices in run_choices(engine, prompts, params)]


def tokens_of(answers: Sequence[Answer]) -> list[list[int]]:
    """The answers' tokens."""
    return [answer.token_ids for answer in answers]
