"""The kinds of provider: which hook offers each, and which flag names one of it."""

from typing import NamedTuple


class Kind(NamedTuple):
    """A kind of provider: the hook that offers it, its interface's version, and the flag that names one of it."""

    hook: str
    api: int
    flag: str | None

    @property
    def title(self) -> str:
        """The kind in words, singular."""
        return self.hook.removeprefix("octavo_").removesuffix("s").replace("_", " ")

    @property
    def accepted(self) -> tuple[int, ...]:
        """The interface versions that this core serves: its own, and the one before."""
        return tuple(version for version in (self.api, self.api - 1) if version > 0)


KINDS = {
    "attention": Kind("octavo_attention_backends", 1, "--attention-backend"),
    "kv_cache": Kind("octavo_kv_cache_formats", 1, "--kv-cache-dtype"),
    "weights": Kind("octavo_weight_formats", 1, "--quantization"),
    "matmul": Kind("octavo_matmuls", 1, "--linear-backend"),
    "ops": Kind("octavo_fused_ops", 1, "--ops-backend"),
    "communicator": Kind("octavo_communicators", 1, "--communicator"),
    "executor": Kind("octavo_executors", 1, "--distributed-executor-backend"),
    "model": Kind("octavo_models", 1, None),
    "checkpoint_reader": Kind("octavo_checkpoint_readers", 1, None),
    "logits_processor": Kind("octavo_logits_processors", 1, None),
    "command": Kind("octavo_commands", 1, None),
}
