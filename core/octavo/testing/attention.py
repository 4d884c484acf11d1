"""Attention backends under test: paged batches made to trip them, a float64 oracle, and the check of the contract.

case = make_case(make_spec(num_heads=8, num_kv_heads=2), [(1, 40), (7, 23)])
check_attention(MyBackend, case)

Tensors are made on torch's default device: a case is moved with `case.to("cuda")`, or made there under
`with torch.device("cuda")`, where its random numbers are others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from octavo.attention.interface import AttentionBackend, AttentionSpec
from octavo.batch import Batch, BatchShape
from octavo.device import DeviceInfo
from octavo.kv_cache.interface import KVCache, KVCacheFormat, KVSpec
from octavo.kv_cache.plain import PlainFormat

POISON = 0xFF  # every byte so: NaN in all floating dtypes
_GUARD = 2  # tokens before and after `out` and `lse`, which nobody may write
_SCRATCH_GUARD = 256  # bytes before and after the scratch, likewise; a multiple of every kernel's alignment
_SCORES_AT_ONCE = 1 << 24  # scores that the oracle holds at a time


def make_spec(
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: DeviceInfo | None = None,
    cache_format: type[KVCacheFormat] = PlainFormat,
    **features: Any,
) -> AttentionSpec:
    """A spec for tests; `features` such as window=5. `cache_format` is built for it without options."""
    kv_spec = KVSpec(num_kv_heads, head_dim, block_size, dtype)
    built: Any = cache_format(kv_spec, None)  # type: ignore[call-arg]
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        dtype=dtype,
        kv_layout=built.layout,
        block_size=block_size,
        max_requests=64,
        max_tokens=1024,
        max_model_len=2048,
        device=device or DeviceInfo("cpu", "CPU"),
        cache_format=built,
        features=features,
    )


@dataclass(frozen=True, slots=True)
class Expected:
    """The oracle's answer in float64, and what an error may be measured by.

    out and spread [T, Hq, D], lse and scores [T, Hq]: `spread` is the sum of probability times |v|, `scores` the
    largest sum of |q k| scale. Padding has out 0 and lse -inf.
    """

    out: torch.Tensor
    lse: torch.Tensor
    spread: torch.Tensor
    scores: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """A batch with its cache, its queries q [T, Hq, D], its `new` keys and values, and what is right."""

    spec: AttentionSpec
    batch: Batch
    kv: KVCache
    q: torch.Tensor
    new: tuple[torch.Tensor, torch.Tensor]
    expected: Expected

    def to(self, device: torch.device | str) -> "AttentionCase":
        """The case with its inputs on `device`, strides and all; what is expected stays where it is."""
        batch = self.batch
        tensors: dict[str, Any] = {name: as_it_lies(getattr(batch, name), device) for name in _BATCH_TENSORS}
        for name in ("block_tables", "slots"):
            tensors[name] = tuple(as_it_lies(x, device) for x in getattr(batch, name))
        return replace(
            self,
            batch=replace(batch, **tensors),
            kv=_moved(self.kv, self.spec.cache_format, device),
            q=as_it_lies(self.q, device),
            new=(as_it_lies(self.new[0], device), as_it_lies(self.new[1], device)),
        )


def _moved(kv: KVCache, cache_format: KVCacheFormat, device: torch.device | str) -> KVCache:
    """A copy of the cache on `device`, with its scales."""
    raw = kv.raw.to(device, copy=True)
    if kv.k_scale is None or kv.v_scale is None:
        return cache_format.view(raw)
    return cache_format.view(raw, torch.stack((kv.k_scale, kv.v_scale)).to(device))


_BATCH_TENSORS = ("token_ids", "positions", "query_start", "seq_lens", "row_index", "sample_index")


def as_it_lies(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A copy of x on `device` with its strides and offset, in a copy of all that it is a view of (C9)."""
    count = x.untyped_storage().nbytes() // x.element_size()
    whole = x.as_strided((count,), (1,), 0).to(device, copy=True)
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One request by the definition, in float64: the last len(q) of len(k) tokens, q [n, Hq, D] and k, v [m, Hk, D].

    Returns out and spread [n, Hq, D], lse and scores [n, Hq] (`Expected`). Contract C1, C8 and C11.
    """
    group = spec.num_heads // spec.num_kv_heads
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
    scores = q @ k.transpose(1, 2) * spec.scale
    if spec.features.get("softcap"):
        scores = spec.features["softcap"] * torch.tanh(scores / spec.features["softcap"])
    keys = torch.arange(k.shape[1], device=q.device)
    ahead = keys - keys[k.shape[1] - q.shape[1] :].view(-1, 1)
    hidden = ahead > 0
    if spec.features.get("window"):
        hidden |= ahead <= -spec.features["window"]
    scores = scores.masked_fill(hidden, float("-inf"))
    weights = scores.softmax(-1)
    largest = (q.abs() @ k.abs().transpose(1, 2) * spec.scale).masked_fill(hidden, 0).amax(-1)
    out, spread = (weights @ x for x in (v, v.abs()))
    return out.transpose(0, 1), scores.logsumexp(-1).T, spread.transpose(0, 1), largest.T


def make_case(
    spec: AttentionSpec,
    requests: Sequence[tuple[int, int]],
    *,
    seed: int = 0,
    padding_requests: int = 0,
    padding_tokens: int = 0,
    magnitude: float = 1.0,
    poison: int = POISON,
) -> AttentionCase:
    """A random batch of requests (query_len, seq_len), one-token ones first; all that is unused holds NaN (C10).

    (Or, with another byte as `poison`, what that byte makes of the format's numbers.)
    Blocks lie in random order, tables have a row stride of their own, and q, k and v are views of one tensor (C9).
    Entries behind a window are the null block. `padding_requests` follow with seq_len 0: of one token each where all
    requests are (the decode graph's padding), else of none; then `padding_tokens` tokens that are nobody's (C3).
    """
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    query_lens, seq_lens = [n for n, _ in requests], [m for _, m in requests]
    num_decodes = next((i for i, n in enumerate(query_lens) if n != 1), len(query_lens))
    if any(n == 1 for n in query_lens[num_decodes:]):
        raise ValueError("Requests of one token come first in a batch: reorder `requests`.")
    each = 1 if num_decodes == len(query_lens) else 0
    padding = [each] * padding_requests
    query_start = torch.tensor([0, *query_lens, *padding]).cumsum(0).int()
    num_requests, num_tokens = len(seq_lens) + len(padding), int(query_start[-1]) + padding_tokens
    blocks = _deal_blocks(seq_lens, spec.block_size, generator)
    kv, keys_values = _fill_cache(spec, seq_lens, blocks, magnitude, poison, generator)
    qkv = torch.randn(num_tokens, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim, generator=generator)
    qkv = (qkv * magnitude).to(spec.dtype)
    q, k, v = torch.split_with_sizes(qkv, [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
    slots = torch.full((num_tokens,), -1)
    positions = torch.zeros(num_tokens, dtype=torch.int32)
    for i, (n, m) in enumerate(requests):
        part = slice(int(query_start[i]), int(query_start[i]) + n)
        where = torch.arange(m - n, m)
        positions[part] = where.int()
        slots[part] = blocks[i][where // spec.block_size] * spec.block_size + where % spec.block_size
        k[part], v[part] = (x[m - n :] for x in keys_values[i])
    batch = Batch(
        BatchShape(
            num_tokens, num_requests, max([*query_lens, *padding], default=0), num_decodes + each * padding_requests
        ),
        torch.zeros(num_tokens, dtype=torch.int32),
        positions,
        query_start,
        torch.tensor([*seq_lens, *(0 for _ in padding)], dtype=torch.int32),
        torch.randperm(num_requests, generator=generator).int(),
        (_table(spec, requests, blocks, len(padding)),),
        (slots,),
        (query_start[1:] - 1).clamp(min=0),
        query_start.tolist(),
        [*seq_lens, *(0 for _ in padding)],
    )
    return AttentionCase(spec, batch, kv, q, (k, v), _expect(spec, batch, q, blocks, kv))


def _deal_blocks(seq_lens: list[int], block_size: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Each request's blocks: all but the null block and some that stay free, in random order."""
    counts = [-(-m // block_size) for m in seq_lens]
    order = torch.randperm(sum(counts) + 3, generator=generator) + 1
    return list(torch.split_with_sizes(order[: sum(counts)], counts))


def _fill_cache(
    spec: AttentionSpec,
    seq_lens: list[int],
    blocks: list[torch.Tensor],
    magnitude: float,
    poison: int,
    generator: torch.Generator,
) -> tuple[KVCache, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A cache of NaN with random keys and values of every request written to it; these too, [m, Hk, D] each."""
    num_blocks = max((int(x.max()) for x in blocks if len(x)), default=0) + 4
    kv = spec.cache_format.view(torch.full((num_blocks, spec.cache_format.page_bytes()), poison, dtype=torch.uint8))
    keys_values = []
    for m, mine in zip(seq_lens, blocks, strict=True):
        where = torch.arange(m)
        slots = mine[where // spec.block_size] * spec.block_size + where % spec.block_size
        pair = torch.randn(2, m, spec.num_kv_heads, spec.head_dim, generator=generator) * magnitude
        k, v = pair.to(spec.dtype)
        spec.cache_format.write(kv, k, v, slots)
        keys_values.append((k, v))
    return kv, keys_values


def _table(
    spec: AttentionSpec, requests: Sequence[tuple[int, int]], blocks: list[torch.Tensor], num_padding: int
) -> torch.Tensor:
    """The block table [R, B], a view of a wider one."""
    width = max((len(x) for x in blocks), default=0) + 1
    table = torch.zeros(len(requests) + num_padding, width + 2, dtype=torch.int32)[:, :width]
    for row, (n, m), mine in zip(table, requests, blocks, strict=False):
        row[: len(mine)] = mine.int()
        if spec.features.get("window"):
            row[: max(0, m - n + 1 - spec.features["window"]) // spec.block_size] = 0
    return table


def _expect(spec: AttentionSpec, batch: Batch, q: torch.Tensor, blocks: list[torch.Tensor], kv: KVCache) -> Expected:
    """The oracle on what the format reads back, so that a format's own rounding is no error of the backend."""
    out, spread = (torch.zeros(q.shape, dtype=torch.float64) for _ in range(2))
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float64)
    scores = torch.zeros_like(lse)
    for i, mine in enumerate(blocks):
        begin, end = batch.query_start_host[i : i + 2]
        k, v = spec.cache_format.read(kv, mine, batch.seq_lens_host[i])
        at_once = max(1, _SCORES_AT_ONCE // (spec.num_heads * max(1, len(k))))
        for start in range(begin, end, at_once):
            stop = min(start + at_once, end)
            part, seen = slice(start, stop), len(k) - (end - stop)
            out[part], lse[part], spread[part], scores[part] = attend(q[part], k[:seen], v[:seen], spec)
    return Expected(out, lse, spread, scores)


def out_tolerance(case: AttentionCase) -> torch.Tensor:
    """The largest error [T, Hq, D] that rounding explains.

    The dtype may round the probabilities once and the output once; sums of D and of L products in float32 err by at
    most D u and L u of their terms' absolute sum (Higham 2002, eq. 3.5), and a score's error is relative in its weight.
    """
    expected, unit, half = case.expected, 2.0**-24, torch.finfo(case.spec.dtype).eps / 2
    scores = 2 * (case.spec.head_dim + 2) * unit * expected.scores.unsqueeze(-1)
    length = max(case.batch.seq_lens_host, default=0) + 2
    return 1.5 * (half * expected.out.abs() + (half + length * unit + scores) * expected.spread) + 1e-30


def lse_tolerance(case: AttentionCase) -> torch.Tensor:
    """The largest error [T, Hq] of a log-sum-exp in float32."""
    length = max(case.batch.seq_lens_host, default=0) + 2
    size = case.expected.lse.abs().nan_to_num(0.0, 0.0)
    return 2.0**-24 * (2 * (case.spec.head_dim + 2) * case.expected.scores + length + 4 * size)


def build_attention(
    backend: type[AttentionBackend], spec: AttentionSpec, options: Any, device: torch.device | str
) -> tuple[AttentionBackend, torch.Tensor]:
    """The backend on a scratch of NaN, and the scratch with the guards around it, for `assert_guarded`."""
    size = backend.scratch_bytes(spec, options)
    guarded = torch.full((size + 2 * _SCRATCH_GUARD,), POISON, dtype=torch.uint8, device=device)
    return backend(spec, options, guarded[_SCRATCH_GUARD : _SCRATCH_GUARD + size]), guarded


def assert_guarded(scratch: torch.Tensor) -> None:
    """Raise AssertionError where a backend wrote beyond the scratch that it asked for."""
    ends = torch.cat((scratch[:_SCRATCH_GUARD], scratch[-_SCRATCH_GUARD:]))
    assert ends.eq(POISON).all(), "C13: wrote around the scratch, so scratch_bytes is too small"


def run_attention(
    backend: type[AttentionBackend],
    case: AttentionCase,
    options: Any = None,
    *,
    with_lse: bool = False,
    with_new: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Plan and forward once, into NaN: (out, lse). Raises AssertionError where anything else was written (C13)."""
    spec, device = case.spec, case.q.device
    built, scratch = build_attention(backend, spec, options, device)
    wide_out, out = _guarded(case.q.shape, spec.dtype, device)
    wide_lse, lse = _guarded(case.q.shape[:2], torch.float32, device)
    before = [x.clone() for x in _inputs(case)]
    built.forward(
        built.plan(case.batch), case.q, case.kv, out, lse if with_lse else None, case.new if with_new else None
    )
    for was, now in zip(before, _inputs(case), strict=True):
        same = torch.equal(was.contiguous().view(torch.uint8), now.contiguous().view(torch.uint8))
        assert same, "C13: forward or plan wrote to its inputs"
    for wide, name in ((wide_out, "out"), (wide_lse, "lse")):
        assert wide[:_GUARD].isnan().all() and wide[-_GUARD:].isnan().all(), f"C13: wrote around {name}"
    assert_guarded(scratch)
    return out, lse if with_lse else None


def _guarded(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of NaN and its middle, of `shape`."""
    wide = torch.full((shape[0] + 2 * _GUARD, *shape[1:]), torch.nan, dtype=dtype, device=device)
    return wide, wide[_GUARD : _GUARD + shape[0]]


def _inputs(case: AttentionCase) -> list[torch.Tensor]:
    batch = case.batch
    return [case.kv.raw, case.q, *case.new, batch.query_start, batch.seq_lens, *batch.block_tables, *batch.slots]


def check_attention(
    backend: type[AttentionBackend],
    case: AttentionCase,
    options: Any = None,
    *,
    with_lse: bool = False,
    with_new: bool = True,
) -> None:
    """Assert that the backend is right on the case. Raises AssertionError naming the rule and the worst element."""
    assert_right(case, *run_attention(backend, case, options, with_lse=with_lse, with_new=with_new))


def assert_right(case: AttentionCase, out: torch.Tensor, lse: torch.Tensor | None = None) -> None:
    """Assert that out [T, Hq, D] and lse [T, Hq] are the case's. Raises AssertionError naming rule and element."""
    assert out.isfinite().all(), "C3, C10: out is not finite"
    _assert_near(out, case.expected.out, out_tolerance(case), "C1, C11: out")
    if lse is not None:
        empty = case.expected.lse.isneginf()
        lse = lse.to(empty.device)
        assert torch.equal(lse.isneginf(), empty), "C8: lse is -inf for padding, and for nothing else"
        live = ~empty
        _assert_near(lse[live], case.expected.lse[live], lse_tolerance(case)[live], "C8: lse")


def _assert_near(got: torch.Tensor, wanted: torch.Tensor, tolerance: torch.Tensor, what: str) -> None:
    excess = (got.to(wanted.device).double() - wanted).abs() - tolerance
    if excess.numel() and not excess.max() <= 0:  # NaN counts as wrong
        at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(
            f"{what} is {got[at]:.8g} at {at}, but {wanted[at]:.8g} is right within {tolerance[at]:.2g};"
            f" {int((excess > 0).sum())} of {excess.numel()} elements are wrong."
        )
