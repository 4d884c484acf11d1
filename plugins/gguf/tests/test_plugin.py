"""The hook module: what it offers, and that neither it nor opening a file imports torch."""

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from octavo_gguf import plugin
from octavo_gguf.reader import GGUFReader

OPEN_WITHOUT_TORCH = """
import sys
from pathlib import Path
import octavo_gguf.plugin
heavy = {"torch", "tokenizers", "octavo_gguf.reader"} & sys.modules.keys()
assert not heavy, f"the hook module imports {heavy}"
from octavo_gguf.reader import GGUFReader
reader = GGUFReader(Path(sys.argv[1]))
assert "tokenizer.json" in reader.tokenizer_files()
assert "torch" not in sys.modules
"""


def test_the_provider_names_the_reader() -> None:
    (provider,) = plugin.octavo_checkpoint_readers()
    assert provider.name == "gguf"
    module, name = str(provider.factory).split(":")
    assert getattr(import_module(module), name) is GGUFReader


def test_nothing_heavy_is_imported(
    tmp_path: Path, write_gguf: Callable[..., Path], tiny_metadata: dict[str, Any], tiny_tensors: dict[str, Any]
) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_metadata, tiny_tensors)
    done = subprocess.run([sys.executable, "-c", OPEN_WITHOUT_TORCH, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
