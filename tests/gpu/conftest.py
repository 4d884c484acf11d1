"""Every test here needs a GPU, and what lies in tests/cpu: the tiny models."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

CPU_TESTS = Path(__file__).parent.parent / "cpu"
sys.path.insert(0, str(CPU_TESTS))

if TYPE_CHECKING:
    from tiny_models import Reference

TINY = ("llama", "llama-rope-scaled-tied", "llama-biased", "mistral-window", "qwen2-two-groups", "qwen3")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", params=TINY)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Reference"]:
    """Each tiny model in turn, with the tokens that transformers generates on the CPU in float32."""
    from tiny_models import make_reference

    yield make_reference(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> "Reference":
    """The plainest tiny model."""
    from tiny_models import make_reference

    return make_reference("llama", tmp_path_factory.mktemp("llama"))
