"""Without a GPU the kernels run in Triton's interpreter, which is chosen when they are imported."""

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

_INTERPRETED = not torch.cuda.is_available()
_KERNELS = ("chain", "softmax", "decode_kernel", "prefill_kernel", "schedule_kernel")

if find_spec("triton") and _INTERPRETED:
    with pytest.MonkeyPatch.context() as patch:  # only for these imports: other tests' processes must not inherit it
        patch.setenv("TRITON_INTERPRET", "1")
        for kernel in _KERNELS:
            import_module(f"octavo_attention_triton.{kernel}")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """`why_not` takes a CPU for one that serves."""
    if _INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
