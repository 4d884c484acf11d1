"""What a user may set: `--attention-backend triton:splits=8,pdl=false`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TritonAttentionOptions:
    """`splits`: into how many parts each decoding request's keys are cut, None to even out the batch's work.

    `min_keys`: keys that a part holds at least when `splits` is None; None takes the tuned number.
    `pdl`: overlap each kernel's launch with the end of its predecessor, where the GPU can (Hopper and newer).
    """

    splits: int | None = None
    min_keys: int | None = None
    pdl: bool = True

    def __post_init__(self) -> None:
        for name in ("splits", "min_keys"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1")
