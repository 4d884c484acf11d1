"""`octavo compare ops`: each fused op of two or more providers, numbers first, then times from a cold cache."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch
from octavo.device import DeviceInfo
from octavo.errors import ConfigError, PluginError
from octavo.ops.interface import OPS, OpSpec
from octavo.plugins.loading import load_plugins
from octavo.plugins.registry import Plugins
from octavo.plugins.selection import choose
from octavo.testing.ceilings import measure_ceilings
from octavo.testing.ops import error

from octavo_workbench.compare.arguments import add_comparison_arguments, batches_of, device_of, dtype_of, labels
from octavo_workbench.compare.op_cases import OpCase, Tensors, op_case
from octavo_workbench.compare.outcome import Entry, Errors, Work, as_json, entries, misses, outcome_table, verdicts
from octavo_workbench.compare.turns import Contender, num_copies, time_in_turns
from octavo_workbench.report import verdict, write_json


def add_arguments(parser: ArgumentParser) -> None:
    """Add the comparison's flags; of a batch only its number of tokens matters."""
    add_comparison_arguments(parser, "providers of fused ops")
    parser.add_argument(
        "--op", action="append", metavar="OP", help=f"of {', '.join(OPS)} (default: all that both offer)"
    )


def run(args: Namespace) -> int:
    """Print errors, times and verdicts; 1 if `--max-error` or `--min-speedup` is missed."""
    names, device, dtype = labels(args.names), device_of(args), dtype_of(args)
    wanted = _wanted_ops(args)
    plugins, ceilings = load_plugins(), measure_ceilings(device.type, dtype)
    print(f"{device.name}, {args.shape.name}, {args.dtype}; ceilings: {ceilings}")
    found: list[Entry] = []
    for op in wanted:
        built = _built(plugins, args, OpSpec(op, dtype, device))
        if built is None:
            continue
        for num_tokens in sorted({batch.num_tokens for batch in batches_of(args, device)}):
            with torch.device(device.type):
                case = op_case(op, args.shape, num_tokens, dtype, args.block_size)
            found += compare(f"{op}, {num_tokens} tokens", names, built, case, args.runs, device)
    if not found:
        raise PluginError(f"No op is served by all of {', '.join(names)} here.")
    print(outcome_table(found, ceilings))
    print("\n".join(verdicts(found, names[0])))
    settings = {"device": device.name, "shape": args.shape.name, "block_size": args.block_size}
    write_json(args.json, {"comparison": "ops", **settings, **as_json(found, ceilings)})
    return verdict(misses(found, args))


def _wanted_ops(args: Namespace) -> list[str]:
    unknown = [op for op in args.op or () if op not in OPS]
    if unknown:
        raise ConfigError(f"--op names {', '.join(unknown)}, but the ops are {', '.join(OPS)}.")
    return args.op or list(OPS)


def _built(plugins: Plugins, args: Namespace, spec: OpSpec) -> list[Any] | None:
    """The providers; None, with the reason printed, where one does not serve the op and it was not asked for."""
    try:
        chosen = [choose(plugins, "ops", spec, (name,)) for name in args.names]
    except PluginError as reason:
        if args.op:
            raise
        print(f"{spec.op} is left out: {reason}")
        return None
    return [one.cls(one.options) for one in chosen]


def compare(
    name: str, names: Sequence[str], built: Sequence[Any], case: OpCase, rounds: int, device: DeviceInfo
) -> list[Entry]:
    """Each provider's errors on the case, and its times."""
    errors = [errors_of(ops, case) for ops in built]
    copies = num_copies(device.type, case.num_bytes)
    contenders = [Contender(label, _launcher(ops, case, copies), True) for label, ops in zip(names, built, strict=True)]
    samples = time_in_turns(contenders, copies, rounds, device.type)
    return entries(name, names, errors, samples, Work(case.num_bytes, case.num_flops))


def errors_of(ops: Any, case: OpCase) -> Errors:
    """Errors against float64 in units of the tolerance, over all results."""
    got = case.call(ops, _fresh(case))
    wanted = case.wanted(case.inputs, got)
    errors = torch.cat([error(one, right).flatten() for one, right in zip(got, wanted, strict=True)])
    return Errors(float(errors.max()), float(errors.mean()))


def _launcher(ops: Any, case: OpCase, copies: int) -> Callable[[int], Tensors]:
    inputs = [_fresh(case) for _ in range(copies)]
    return lambda i: case.call(ops, inputs[i])


def _fresh(case: OpCase) -> Tensors:
    return tuple(x.clone() for x in case.inputs)
