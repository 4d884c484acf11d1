"""Without a GPU the plugins' Triton kernels run in Triton's interpreter, which is chosen when Triton is imported.

So it is imported here, before any test can. The variable that asks for it must not outlive the import: what tests start
would find it, and take the interpreter for a GPU.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch


def _import_interpreter() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        interpreter: Any = import_module("triton.runtime.interpreter")
        import_module("triton.language")
        import_module("triton.experimental.gluon")
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        """Triton makes an int of an array of one element, which NumPy 2.4 refuses: a loop's bounds are such arrays."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_index


if find_spec("triton") and not torch.cuda.is_available():
    _import_interpreter()
