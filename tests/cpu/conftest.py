"""Lets the tests of this folder import what lies beside them, and gives them the tiny models."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from tiny_models import Reference

TINY = ("llama", "llama-rope-scaled-tied", "llama-biased", "mistral-window", "qwen2-two-groups", "qwen3")


@pytest.fixture(autouse=True)
def num_threads() -> Iterator[None]:
    """An engine sets the number of torch's threads; the next test gets the usual one."""
    import torch

    usual = torch.get_num_threads()
    yield
    torch.set_num_threads(usual)


def _reference(name: str, tmp_path_factory: pytest.TempPathFactory) -> "Reference":
    from tiny_models import make_reference

    return make_reference(name, tmp_path_factory.mktemp(name))


@pytest.fixture(scope="session", params=TINY)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> "Reference":
    """Each tiny model in turn."""
    return _reference(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> "Reference":
    """The plainest tiny model."""
    return _reference("llama", tmp_path_factory)
