"""`octavo compare attention`: backends on one paged batch, numbers first, then times from a cold cache."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from octavo.attention.interface import AttentionSpec, GraphSupport
from octavo.device import DeviceInfo
from octavo.kv_cache.interface import KVCache
from octavo.plugins.loading import load_plugins
from octavo.plugins.registry import LoadedProvider, Plugins
from octavo.plugins.selection import Selection, choose
from octavo.testing.attention import AttentionCase, as_it_lies, build_attention, make_case, make_spec, out_tolerance
from octavo.testing.attention import run_attention as run_once
from octavo.testing.ceilings import measure_ceilings

from octavo_workbench.bench.arguments import positive, ratio
from octavo_workbench.compare.arguments import add_comparison_arguments, batches_of, device_of, dtype_of, labels
from octavo_workbench.compare.outcome import Entry, Errors, Work, as_json, entries, misses, outcome_table, verdicts
from octavo_workbench.compare.sizes import NamedBatch, Shape
from octavo_workbench.compare.turns import Contender, num_copies, time_in_turns
from octavo_workbench.report import verdict, write_json


def add_arguments(parser: ArgumentParser) -> None:
    """Add the comparison's flags."""
    add_comparison_arguments(parser, "attention backends")
    parser.add_argument("--window", type=positive, metavar="N", help="attention window (default: none)")
    parser.add_argument("--softcap", type=ratio, metavar="X", help="cap of the scores (default: none)")


def run(args: Namespace) -> int:
    """Print errors, times and verdicts; 1 if `--max-error` or `--min-speedup` is missed."""
    names, device, dtype = labels(args.names), device_of(args), dtype_of(args)
    plugins, ceilings = load_plugins(), measure_ceilings(device.type, dtype)
    print(f"{device.name}, {args.shape.name}, {args.dtype}; ceilings: {ceilings}")
    features = {name: value for name in ("window", "softcap") if (value := getattr(args, name)) is not None}
    found: list[Entry] = []
    for batch in batches_of(args, device):
        spec = spec_of(args.shape, batch, dtype, device, args.block_size, features)
        chosen = [select(plugins, name, spec) for name in args.names]
        found += compare(names, chosen, spec, batch, args.runs)
    print(outcome_table(found, ceilings))
    print("\n".join(verdicts(found, names[0])))
    settings = {"device": device.name, "shape": args.shape.name, "block_size": args.block_size, "features": features}
    write_json(args.json, {"comparison": "attention", **settings, **as_json(found, ceilings)})
    return verdict(misses(found, args))


def spec_of(
    shape: Shape, batch: NamedBatch, dtype: torch.dtype, device: DeviceInfo, block_size: int, features: dict[str, Any]
) -> AttentionSpec:
    """The spec of a model of that shape whose limits hold the batch; a kernel's own sizes may follow from them."""
    spec = make_spec(
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        block_size=block_size,
        dtype=dtype,
        device=device,
        **features,
    )
    return replace(
        spec,
        max_requests=max(spec.max_requests, len(batch.requests)),
        max_tokens=max(spec.max_tokens, batch.num_tokens),
        max_model_len=max(spec.max_model_len, *(m for _, m in batch.requests)),
    )


def select(plugins: Plugins, name: str, spec: AttentionSpec) -> Selection:
    """The backend that is named, with its options. Raises PluginError with its reason where it cannot serve."""

    def reads_layout(provider: LoadedProvider, cls: Any, options: Any) -> str | None:
        served = cls.kv_layouts is None or spec.kv_layout in cls.kv_layouts
        return None if served else f"it does not read the KV layout {spec.kv_layout}"

    return choose(plugins, "attention", spec, (name,), build_reason=reads_layout)


def compare(
    names: Sequence[str], chosen: Sequence[Selection], spec: AttentionSpec, batch: NamedBatch, rounds: int
) -> list[Entry]:
    """Each backend's errors on the batch, and its times."""
    device = spec.device.type
    with torch.device(device):
        case = make_case(spec, batch.requests)
    work = work_of(spec, batch)
    errors = [errors_of(case, run_once(one.cls, case, one.options)[0]) for one in chosen]
    copies = num_copies(device, work.num_bytes)
    caches = [spec.cache_format.view(case.kv.raw.clone()) for _ in range(copies)]
    queries = [as_it_lies(case.q, case.q.device) for _ in range(copies)]
    outs = [torch.empty(case.q.shape, dtype=spec.dtype, device=case.q.device) for _ in range(copies)]
    needed = graph_support_needed(batch)
    contenders = [
        Contender(name, launcher(one, case, caches, queries, outs), one.cls.graph_support >= needed)
        for name, one in zip(names, chosen, strict=True)
    ]
    samples = time_in_turns(contenders, copies, rounds, device)
    return entries(batch.name, names, errors, samples, work)


def launcher(
    one: Selection,
    case: AttentionCase,
    caches: Sequence[KVCache],
    queries: Sequence[torch.Tensor],
    outs: Sequence[torch.Tensor],
) -> Callable[[int], None]:
    """A backend that is built, warm and planned for the case; it takes the number of the copy to attend to."""
    backend, _ = build_attention(one.cls, case.spec, one.options, case.q.device)
    backend.warmup([case.batch.shape])
    plan = backend.plan(case.batch)

    def launch(i: int) -> None:
        backend.forward(plan, queries[i], caches[i], outs[i], new=case.new)

    return launch


def errors_of(case: AttentionCase, out: torch.Tensor) -> Errors:
    """Errors against the oracle in units of the tolerance; padding has none."""
    errors = (out.double() - case.expected.out).abs() / out_tolerance(case)
    return Errors(float(errors.max()), float(errors.mean()))


def graph_support_needed(batch: NamedBatch) -> GraphSupport:
    """What a backend must support for the batch to fit a graph."""
    lens = {n for n, _ in batch.requests}
    if lens == {1}:
        return GraphSupport.DECODE
    return GraphSupport.UNIFORM if len(lens) == 1 else GraphSupport.MIXED


def work_of(spec: AttentionSpec, batch: NamedBatch) -> Work:
    """Keys and values that are seen, read once; queries read and outputs written; 4 Hq D operations a query and key."""
    window = spec.features.get("window")
    num_keys = sum(min(m, window + n - 1) if window else m for n, m in batch.requests)
    kv_bytes = num_keys * spec.cache_format.page_bytes() // spec.block_size
    q_bytes = 2 * batch.num_tokens * spec.num_heads * spec.head_dim * spec.dtype.itemsize
    num_pairs = sum(_pairs(n, m, window) for n, m in batch.requests)
    return Work(kv_bytes + q_bytes, 4 * spec.num_heads * spec.head_dim * num_pairs)


def _pairs(query_len: int, seq_len: int, window: int | None) -> int:
    """Queries times keys that they see."""
    if window is None:
        return query_len * seq_len - query_len * (query_len - 1) // 2
    return sum(min(window, i + 1) for i in range(seq_len - query_len, seq_len))
