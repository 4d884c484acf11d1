"""The hook module: what it offers, and that it imports nothing heavy."""

import subprocess
import sys
from importlib import import_module

from octavo_quant_fp8 import plugin
from octavo_quant_fp8.fbgemm import FbgemmFp8
from octavo_quant_fp8.fp8 import Fp8


def test_the_providers_name_the_formats() -> None:
    found = {}
    for provider in plugin.octavo_weight_formats():
        module, name = str(provider.factory).split(":")
        found[provider.name] = getattr(import_module(module), name)
    assert found == {"fp8": Fp8, "fbgemm_fp8": FbgemmFp8}


def test_the_hook_imports_nothing_heavy() -> None:
    code = "import sys, octavo_quant_fp8.plugin; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
