"""The hook module: what it offers, and that it imports nothing heavy."""

import subprocess
import sys
from importlib import import_module

from octavo_quant_compressed_tensors import plugin
from octavo_quant_compressed_tensors.format import CompressedTensors


def test_the_provider_names_the_format() -> None:
    (provider,) = plugin.octavo_weight_formats()
    module, name = str(provider.factory).split(":")
    assert provider.name == "compressed-tensors" and getattr(import_module(module), name) is CompressedTensors


def test_the_hook_imports_nothing_heavy() -> None:
    code = "import sys, octavo_quant_compressed_tensors.plugin; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
