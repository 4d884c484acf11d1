"""The one configuration of an engine: frozen, resolved once, every field documented."""

from dataclasses import dataclass, field
from typing import Any


def _doc(help: str, default: Any = None, short: str | None = None, **metadata: Any) -> Any:
    """A documented field; `short` is another spelling of its flag."""
    return field(default=default, metadata={"help": help, "short": short, **metadata})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What an engine runs and how. A field `max_model_len` is the flag `--max-model-len` and the YAML key of either form."""

    model: str = _doc("HF directory, .gguf file, hub id, or empty for the default model", "")
    tokenizer: str | None = _doc("directory of another tokenizer than the model's")
    revision: str | None = _doc("hub revision of the model")
    download_dir: str | None = _doc("where models are kept; default: the user's cache directory")
    load_format: str = _doc("auto, safetensors, or dummy (random weights)", "auto")
    dtype: str = _doc("auto (the checkpoint's), bfloat16, float16 or float32", "auto")
    device: str = _doc("auto, cpu or cuda", "auto")
    seed: int = _doc("seed from which unseeded requests draw theirs, and of dummy weights", 0)
    max_model_len: int | None = _doc("longest request in tokens; default: the model's", size=True)
    generation_config: str = _doc("auto: sampling defaults from the model's directory; octavo: none", "auto")

    quantization: str | None = _doc("weight format; default: read from the checkpoint", short="-q")
    kv_cache_dtype: str = _doc("KV-cache format; auto: the model's dtype", "auto")
    attention_backend: tuple[str, ...] = _doc("attention backends in order of preference", ())
    prefill_attention_backend: tuple[str, ...] = _doc("attention backends for prefill", ())
    decode_attention_backend: tuple[str, ...] = _doc("attention backends for decode", ())
    linear_backend: tuple[str, ...] = _doc("matmul backends in order of preference", ())
    ops_backend: tuple[str, ...] = _doc("fused-op backends in order of preference", ())
    communicator: tuple[str, ...] = _doc("communicators in order of preference", ())
    distributed_executor_backend: tuple[str, ...] = _doc("executors in order of preference", ())
    plugins: tuple[str, ...] | None = _doc("load only these plugins, besides the built-in ones")
    disable_plugin: tuple[str, ...] = _doc("plugins not to load", ())
    strict_backends: bool = _doc("refuse to start when a named backend cannot serve, rather than try the next", False)
    tensor_parallel_size: int = _doc("GPUs that share each layer", 1, short="-tp")

    block_size: int = _doc("tokens in a KV-cache block", 16)
    gpu_memory_utilization: float = _doc("share of the GPU's memory to use", 0.92)
    kv_cache_memory_bytes: int | None = _doc("bytes of the KV cache; default: what fits", size=True)
    num_gpu_blocks_override: int | None = _doc("blocks in the KV cache, whatever fits")
    enable_prefix_caching: bool = _doc("find the blocks of known prefixes again", True)
    max_num_batched_tokens: int | None = _doc("tokens that a step may compute", size=True)
    max_num_seqs: int | None = _doc("requests that run at once")
    enable_chunked_prefill: bool = _doc("split a prompt over steps where the token budget asks for it", True)
    long_prefill_token_threshold: int = _doc("most tokens of one prompt in a step; 0: no limit", 0)
    scheduling_policy: str = _doc("fcfs or priority", "fcfs")
    max_steps_in_flight: int | None = _doc("steps submitted before the first is back; default: the executor's")
    max_logprobs: int = _doc("most logprobs that a request may ask for", 20)
    enforce_eager: bool = _doc("run without CUDA graphs", False)
    num_threads: int | None = _doc("CPU threads of the kernels; default: torch's")
