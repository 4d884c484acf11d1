"""Lets tests import what lies in tests/helpers, and gives them a small tokenizer."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer

HELPERS = Path(__file__).parent / "helpers"
sys.path.insert(0, str(HELPERS))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> "Tokenizer":
    """A tokenizer of bytes."""
    from octavo.text.tokenizer import Tokenizer
    from tiny_tokenizer import write_tokenizer

    return Tokenizer.from_files(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def helpers_in_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that the test starts find tests/helpers too."""
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HELPERS), *([path] if path else [])]))
