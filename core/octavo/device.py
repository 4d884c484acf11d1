"""What a kernel may ask about the device it would run on."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A device: `type` "cpu" or "cuda", `capability` such as (9, 0) on a GPU and (0, 0) on a CPU."""

    type: str
    name: str
    capability: tuple[int, int] = (0, 0)
    memory_bytes: int = 0

    @property
    def torch_device(self) -> torch.device:
        """The torch device of this process."""
        return torch.device(self.type)


def current_device(kind: str = "auto") -> DeviceInfo:
    """Describe the device named `kind`: "cpu", "cuda", or "auto" (a GPU where there is one)."""
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return DeviceInfo("cpu", "CPU")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return DeviceInfo("cuda", properties.name, (properties.major, properties.minor), properties.total_memory)
