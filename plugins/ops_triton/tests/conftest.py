"""Without a GPU the kernels run in Triton's interpreter, which is chosen when they are imported."""

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

collect_ignore = [] if find_spec("triton") else ["test_ops.py"]

if find_spec("triton") and not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:  # only for these imports: other tests' processes must not inherit it
        patch.setenv("TRITON_INTERPRET", "1")
        import_module("octavo_ops_triton.kernels")
