"""The one configuration of an engine: frozen, resolved once, every field documented."""

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any, Self, get_type_hints

from octavo.errors import ConfigError
from octavo.plugins.values import convert, nearest

_DTYPES = {"half": "float16", "float": "float32"}
_KNOWN = {
    "load_format": ("auto", "safetensors", "dummy"),
    "dtype": ("auto", "bfloat16", "float16", "float32"),
    "device": ("auto", "cpu", "cuda"),
    "scheduling_policy": ("fcfs", "priority"),
    "generation_config": ("auto", "octavo"),
}
_POSITIVE = (
    "max_model_len",
    "tensor_parallel_size",
    "kv_cache_memory_bytes",
    "num_gpu_blocks_override",
    "max_num_batched_tokens",
    "max_num_seqs",
    "max_steps_in_flight",
    "num_threads",
)
_NOT_NEGATIVE = ("long_prefill_token_threshold", "max_logprobs")
MIN_BLOCK_SIZE = 8


def documented(help: str, default: Any = None, short: str | None = None, **metadata: Any) -> Any:
    """A dataclass field with its help text. `short`: another spelling of its flag.

    Metadata: `size=True` allows 32k and 32K; `env="NAME"` is the environment variable that sets it too; `several=True`
    lets a list's flag take `a b` as well as `a,b`.
    """
    return field(default=default, metadata={"help": help, "short": short, **metadata})


def flag_of(name: str) -> str:
    """The flag of a field: `max_model_len` is `--max-model-len`."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What an engine runs and how. A field `max_model_len` is the flag `--max-model-len` and a YAML key.

    Raises ConfigError for a value out of range.
    """

    model: str = documented("HF directory, .gguf file, hub id, or empty for the default model", "")
    tokenizer: str | None = documented("directory of another tokenizer than the model's")
    revision: str | None = documented("hub revision of the model")
    download_dir: str | None = documented(
        "where models are kept; default: the user's cache directory", env="OCTAVO_DOWNLOAD_DIR"
    )
    load_format: str = documented("auto, safetensors, or dummy (random weights)", "auto")
    dtype: str = documented("auto (the checkpoint's), bfloat16, float16 or float32", "auto")
    device: str = documented("auto, cpu or cuda", "auto")
    seed: int = documented("seed from which unseeded requests draw theirs, and of dummy weights", 0)
    max_model_len: int | None = documented("longest request in tokens; default: the model's", size=True)
    generation_config: str = documented(
        "auto: sampling defaults from the model's directory; octavo (or vllm): none", "auto"
    )

    quantization: str | None = documented("weight format; default: read from the checkpoint", short="-q")
    kv_cache_dtype: str = documented("KV-cache format; auto: the model's dtype", "auto")
    kv_scales: str = documented(
        "scales of a KV cache in 8 bits: auto (the checkpoint's, else calibrated once), calibrate, unit, or a file",
        "auto",
    )
    attention_backend: tuple[str, ...] = documented("attention backends in order of preference", ())
    prefill_attention_backend: tuple[str, ...] = documented("attention backends for prefill", ())
    decode_attention_backend: tuple[str, ...] = documented("attention backends for decode", ())
    linear_backend: tuple[str, ...] = documented("matmul backends in order of preference", ())
    ops_backend: tuple[str, ...] = documented("fused-op backends in order of preference", ())
    communicator: tuple[str, ...] = documented("communicators in order of preference", ())
    distributed_executor_backend: tuple[str, ...] = documented("executors in order of preference", ())
    plugins: tuple[str, ...] | None = documented(
        "load only these plugins, besides the built-in ones", env="OCTAVO_PLUGINS"
    )
    disable_plugin: tuple[str, ...] = documented("plugins not to load", ())
    strict_backends: bool = documented(
        "refuse to start when a named backend cannot serve, rather than try the next", False
    )
    tensor_parallel_size: int = documented("GPUs that share each layer", 1, short="-tp")

    block_size: int = documented("tokens in a KV-cache block", 16)
    gpu_memory_utilization: float = documented("share of the GPU's memory to use", 0.92)
    kv_cache_memory_bytes: int | None = documented("bytes of the KV cache; default: what fits", size=True)
    num_gpu_blocks_override: int | None = documented("blocks in the KV cache, whatever fits")
    enable_prefix_caching: bool = documented("find the blocks of known prefixes again", True)
    max_num_batched_tokens: int | None = documented(
        "tokens that a step may compute; default: 2048 on a CPU, 8192 on a GPU", size=True
    )
    max_num_seqs: int | None = documented("requests that run at once; default: 256 on a CPU, 512 on a GPU")
    enable_chunked_prefill: bool = documented("split a prompt over steps where the token budget asks for it", True)
    long_prefill_token_threshold: int = documented("most tokens of one prompt in a step; 0: no limit", 0)
    scheduling_policy: str = documented("fcfs or priority", "fcfs")
    max_steps_in_flight: int | None = documented("steps submitted before the first is back; default: the executor's")
    max_logprobs: int = documented("most logprobs that a request may ask for", 20)
    enforce_eager: bool = documented("run without CUDA graphs", False)
    progress: bool = documented("show progress bars while a model is fetched and loaded", True)
    num_threads: int | None = documented("CPU threads of the kernels; default: torch's")

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> Self:
        """A configuration from loose keyword arguments (lists, text, a torch dtype; None: the default).

        Raises ConfigError for an unknown name, naming the nearest.
        """
        hints = get_type_hints(cls)
        known = {item.name: item.metadata for item in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in kwargs.items():
            check_known(name, known, "an engine argument")
            loose = str(value) if name == "dtype" else value
            if value is not None:
                values[name] = convert(loose, hints[name], name, known[name].get("size", False))
        return cls(**values)

    def __post_init__(self) -> None:
        self._normalise()
        for name, known in _KNOWN.items():
            _check_among(name, getattr(self, name), known)
        for name in _POSITIVE:
            _check_least(name, getattr(self, name), 1)
        for name in _NOT_NEGATIVE:
            _check_least(name, getattr(self, name), 0)
        self._check_ranges()
        self._check_together()

    def _normalise(self) -> None:
        dtype = self.dtype.removeprefix("torch.")
        object.__setattr__(self, "dtype", _DTYPES.get(dtype, dtype))
        if self.generation_config == "vllm":  # launch scripts written for vLLM say it so
            object.__setattr__(self, "generation_config", "octavo")

    def _check_ranges(self) -> None:
        if self.block_size < MIN_BLOCK_SIZE or self.block_size.bit_count() != 1:
            _refuse("block_size", self.block_size, f"a power of two and at least {MIN_BLOCK_SIZE}")
        if not 0 < self.gpu_memory_utilization <= 1:
            _refuse("gpu_memory_utilization", self.gpu_memory_utilization, "above 0 and at most 1")
        if not 0 <= self.seed < 2**64:
            _refuse("seed", self.seed, "from 0 to 2**64 - 1")

    def _check_together(self) -> None:
        both = sorted(set(self.plugins or ()) & set(self.disable_plugin))
        if both:
            raise ConfigError(
                f"plugins (--plugins) and disable_plugin (--disable-plugin) both name {', '.join(both)}: "
                "take it out of one of them."
            )
        budget, longest = self.max_num_batched_tokens, self.max_model_len
        if not self.enable_chunked_prefill and budget and longest and budget < longest:
            raise ConfigError(
                f"max_num_batched_tokens is {budget} and max_model_len {longest}, but without chunked prefill "
                "a step must hold the longest prompt: raise the first, lower the second, "
                "or leave out --no-enable-chunked-prefill."
            )


def check_known(name: str, known: Collection[str], what: str) -> None:
    """Raise ConfigError, naming the nearest known name, unless `name` is known."""
    if name not in known:
        raise ConfigError(f"{name!r} is not {what}.{nearest(name, known)}")


def _refuse(name: str, value: object, wanted: str) -> None:
    raise ConfigError(f"{name} ({flag_of(name)}) is {value!r}, but must be {wanted}.")


def _check_among(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(
            f"{name} ({flag_of(name)}) is {value!r}, but must be one of {', '.join(known)}.{nearest(value, known)}"
        )


def _check_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        _refuse(name, value, f"at least {least}")
