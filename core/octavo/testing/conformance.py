"""What the classes of the conformance kit share: dtypes, the device, what a GPU alone can show. Needs pytest."""

from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch

from octavo.device import DeviceInfo, current_device


class Conformance:
    """The base of the kit's classes. `device` is "auto" (a GPU where there is one), "cpu" or "cuda"."""

    device: ClassVar[str] = "auto"
    dtypes: ClassVar[Sequence[torch.dtype]] = (torch.float32, torch.bfloat16, torch.float16)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test that takes a `dtype` with all of `dtypes`."""
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))

    @property
    def device_info(self) -> DeviceInfo:
        """The device under test."""
        return current_device(self.device)

    def need_gpu(self) -> None:
        """Skip the test where the device is no GPU."""
        if self.device_info.type != "cuda":
            pytest.skip("This rule shows on a GPU only.")
