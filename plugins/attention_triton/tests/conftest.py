"""Without a GPU the kernels run in Triton's interpreter, which is chosen when Triton and the kernels are imported."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch

_INTERPRETED = not torch.cuda.is_available()
_KERNELS = ("chain", "softmax", "decode_kernel", "prefill_kernel", "schedule_kernel")

if find_spec("triton") and _INTERPRETED:
    with pytest.MonkeyPatch.context() as patch:  # only for these imports: other tests' processes must not inherit it
        patch.setenv("TRITON_INTERPRET", "1")
        interpreter: Any = import_module("triton.runtime.interpreter")
        for kernel in _KERNELS:
            import_module(f"octavo_attention_triton.{kernel}")

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        """Triton 3.6 makes an int of an array of one element, which NumPy 2.4 refuses: a loop's bounds are these."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_tensor_and_index


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """`why_not` takes a CPU for one that serves."""
    if _INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
