"""The flags that all comparisons take, and what they say of the device."""

from argparse import ArgumentParser, Namespace

import torch
from octavo.device import DeviceInfo, current_device
from octavo.errors import ConfigError
from octavo.plugins.values import nearest

from octavo_workbench.bench.arguments import positive, ratio
from octavo_workbench.compare.sizes import SHAPES, NamedBatch, batches, shape

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_BATCHES = {"cuda": "decode:32x8192,decode:16x2048,prefill:1x8192", "cpu": "decode:8x512,prefill:1x512"}


def add_comparison_arguments(parser: ArgumentParser, what: str) -> None:
    """Add the contenders' names and the common flags."""
    text = f"{what} to compare, with options if need be (name:option=value); the first is what others are measured by"
    parser.add_argument("names", nargs="+", metavar="NAME", help=text)
    text = f"model shape: {', '.join(SHAPES)} or HQxHKxD (default: llama-8b)"
    parser.add_argument("--shape", type=shape, default=SHAPES["llama-8b"], metavar="SHAPE", help=text)
    text = "batches, such as decode:32x8192,prefill:1x8192,mixed:32x2048+1x1024,ragged:64x4096"
    parser.add_argument("--batch", type=batches, metavar="B,B", help=text)
    parser.add_argument("--dtype", default="bfloat16", metavar="TYPE", help=f"{', '.join(_DTYPES)} (default: bfloat16)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"), help="(default: auto)")
    parser.add_argument("--block-size", type=positive, default=16, metavar="N", help="tokens a block (default: 16)")
    parser.add_argument("--runs", type=positive, default=30, metavar="N", help="rounds to time (default: 30)")
    parser.add_argument("--num-threads", type=positive, metavar="N", help="threads on a CPU (default: torch's choice)")
    text = "exit with 1 if an error is above this many times what rounding explains"
    parser.add_argument("--max-error", type=ratio, metavar="X", help=text)
    text = "exit with 1 if another than the first is not this many times its speed, on any batch"
    parser.add_argument("--min-speedup", type=ratio, metavar="X", help=text)
    parser.add_argument("--json", metavar="FILE", help="write the result to FILE as well")


def device_of(args: Namespace) -> DeviceInfo:
    """The device to compare on. Raises ConfigError where there is none of the kind."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda is given, but torch finds no GPU here: leave it out to compare on the CPU.")
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    return current_device(args.device)


def dtype_of(args: Namespace) -> torch.dtype:
    """The dtype by name. Raises ConfigError."""
    if args.dtype not in _DTYPES:
        raise ConfigError(f"--dtype is {args.dtype!r}, not {', '.join(_DTYPES)}.{nearest(args.dtype, _DTYPES)}")
    return _DTYPES[args.dtype]


def batches_of(args: Namespace, device: DeviceInfo) -> list[NamedBatch]:
    """The batches that were named, or those usual on the device."""
    return args.batch or batches(_BATCHES[device.type])


def labels(names: list[str]) -> list[str]:
    """The names, numbered where one comes again. Raises ConfigError unless there are two to compare."""
    if len(names) < 2:
        raise ConfigError(f"Only {names[0]} is named: name at least two, of which the first is measured by.")
    return [f"{name} #{names[: i + 1].count(name)}" if name in names[:i] else name for i, name in enumerate(names)]
