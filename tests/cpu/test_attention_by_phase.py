"""`by_phase`: decodes to one backend, the rest to another; its facts and sizes; and the flags that ask for it."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from octavo.attention.combinators import by_phase
from octavo.attention.interface import AttentionBackend, AttentionSpec, GraphSupport
from octavo.attention.torch_reference import TorchAttention
from octavo.batch import Batch, BatchShape
from octavo.cli import main
from octavo.config import EngineConfig
from octavo.device import DeviceInfo
from octavo.errors import PluginError
from octavo.plugins.loading import load_plugins
from octavo.runtime.assembly import assemble
from octavo.testing.attention import check_attention, make_case, make_spec
from tiny_models import Reference, run, start, tokens_of

EMPTY = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True)
class Options:
    """What the parts below are told."""

    size: int = 0
    reason: str | None = None


class Recorder(TorchAttention):
    """The reference, which keeps the batches it plans and the shapes it warms up."""

    def __init__(self, spec: AttentionSpec, options: Options, scratch: torch.Tensor) -> None:
        super().__init__(spec, options, scratch)
        self.options, self.scratch = options, scratch
        self.batches: list[Batch] = []
        self.shapes: list[BatchShape] = []

    @staticmethod
    def why_not(spec: AttentionSpec, options: Options) -> str | None:
        return options.reason

    @staticmethod
    def scratch_bytes(spec: AttentionSpec, options: Options) -> int:
        return options.size

    @staticmethod
    def persistent_bytes(spec: AttentionSpec, options: Options) -> int:
        return options.size

    def warmup(self, shapes: list[BatchShape]) -> None:
        self.shapes += shapes

    def plan(self, batch: Batch) -> Any:
        self.batches.append(batch)
        return super().plan(batch)


class Other(Recorder):
    """Reads one layout, and knows windows and sinks."""

    features = frozenset({"window", "sinks"})
    kv_layouts: frozenset[str] | None = frozenset({"plain", "far"})
    graph_support = GraphSupport.MIXED
    deterministic = False
    plans_on_device = True


def parts_of(backend: Any) -> tuple[Recorder, Recorder]:
    return backend.decode, backend.prefill


@pytest.mark.parametrize("features", [{}, {"window": 9}, {"softcap": 2.0}])
@pytest.mark.parametrize(
    "requests",
    [
        [(1, 20), (1, 33), (7, 40), (12, 12)],
        [(1, 20), (1, 33)],
        [(7, 40), (12, 12)],
        [(1, 1), (2, 2)],
        [],
    ],
)
def test_the_contract_holds(features: dict[str, Any], requests: list[tuple[int, int]]) -> None:
    joined = by_phase(TorchAttention, TorchAttention)
    for padding_requests in (0, 2):
        case = make_case(make_spec(**features), requests, padding_requests=padding_requests)
        for with_lse in (False, True):
            check_attention(joined, case, with_lse=with_lse)
            check_attention(joined, case, with_lse=with_lse, with_new=False)


def test_each_part_plans_its_own_requests() -> None:
    """Sub-batches are views, and the lengths of the second begin at 0 again."""
    case = make_case(make_spec(), [(1, 20), (1, 33), (7, 40), (12, 12)], padding_requests=1, padding_tokens=2)
    backend = by_phase(Recorder, Recorder, Options(1), Options(2))(case.spec, None, EMPTY)
    backend.plan(case.batch)
    decode, prefill = parts_of(backend)
    assert (decode.options, prefill.options) == (Options(1), Options(2))
    (first,), (second,) = decode.batches, prefill.batches
    assert first.shape == BatchShape(2, 2, 1, 2)
    assert second.shape == BatchShape(21, 3, 12, 0)
    assert first.query_start_host == first.query_start.tolist() == [0, 1, 2]
    assert second.query_start_host == second.query_start.tolist() == [0, 7, 19, 19]
    assert second.query_start.dtype is torch.int32
    assert (first.seq_lens_host, second.seq_lens_host) == ([20, 33], [40, 12, 0])
    for name in ("token_ids", "positions", "seq_lens", "row_index"):
        whole, parts = getattr(case.batch, name), [getattr(x, name) for x in (first, second)]
        assert torch.equal(torch.cat(parts), whole)
        assert parts[0].data_ptr() == whole.data_ptr()
    for name in ("block_tables", "slots"):
        parts = [getattr(x, name)[0] for x in (first, second)]
        assert torch.equal(torch.cat(parts), getattr(case.batch, name)[0])
    assert case.batch.query_start_host == [0, 1, 2, 9, 21, 21]


@pytest.mark.parametrize(("requests", "who"), [([(1, 9)], 0), ([(4, 9)], 1)])
def test_a_batch_of_one_phase_is_passed_on_as_it_is(requests: list[tuple[int, int]], who: int) -> None:
    """So a graph's buffers stay the same, its padding included."""
    case = make_case(make_spec(), requests, padding_requests=3)
    backend = by_phase(Recorder, Recorder, Options(), Options())(case.spec, None, EMPTY)
    backend.plan(case.batch)
    assert [len(part.batches) for part in parts_of(backend)] == [1 - who, who]
    assert parts_of(backend)[who].batches[0] is case.batch


def test_facts_are_those_of_both() -> None:
    spec = make_spec()
    joined = by_phase(Recorder, Other, Options(100), Options(300))
    assert joined.features == {"window"}
    assert joined.kv_layouts == Other.kv_layouts
    assert by_phase(Other, Recorder).kv_layouts == Other.kv_layouts
    assert by_phase(Recorder, Recorder).kv_layouts is None
    assert not joined.deterministic and by_phase(Recorder, Recorder).deterministic
    assert not by_phase(Other, Recorder).plans_on_device and by_phase(Other, Other).plans_on_device
    assert joined.scratch_bytes(spec, None) == 300
    assert joined.persistent_bytes(spec, None) == 400


def test_graphs_hold_what_both_parts_allow() -> None:
    """A graph of decodes needs the decode part only; where decodes end in a mixed batch is not a graph's to know."""

    def backend(support: GraphSupport) -> type[AttentionBackend]:
        return type("Backend", (TorchAttention,), {"graph_support": support})

    none, decode, uniform, mixed = map(backend, GraphSupport)
    assert by_phase(none, mixed).graph_support is GraphSupport.NONE
    assert by_phase(mixed, none).graph_support is GraphSupport.DECODE
    assert by_phase(decode, mixed).graph_support is GraphSupport.DECODE
    assert by_phase(uniform, mixed).graph_support is GraphSupport.UNIFORM
    assert by_phase(mixed, mixed).graph_support is GraphSupport.UNIFORM


def test_why_not_names_the_phase() -> None:
    spec = make_spec()
    bad = Options(reason="it is Monday")
    assert by_phase(Recorder, Recorder, Options(), Options()).why_not(spec, None) is None
    assert by_phase(Recorder, Recorder, Options(), bad).why_not(spec, None) == "for prefill: it is Monday"
    both = by_phase(Recorder, Recorder, bad, bad).why_not(spec, None)
    assert both == "for decode: it is Monday; for prefill: it is Monday"


def test_warmup_splits_shapes_as_plan_splits_batches() -> None:
    backend = by_phase(Recorder, Recorder, Options(), Options())(make_spec(), None, EMPTY)
    backend.warmup([BatchShape(8, 8, 1, 8), BatchShape(40, 6, 32, 4), BatchShape(64, 2, 32, 0)])
    decode, prefill = parts_of(backend)
    assert decode.shapes == [BatchShape(8, 8, 1, 8), BatchShape(4, 4, 1, 4)]
    assert prefill.shapes == [BatchShape(36, 2, 32, 0), BatchShape(64, 2, 32, 0)]


def test_parts_share_the_scratch() -> None:
    scratch = torch.empty(7, dtype=torch.uint8)
    parts = parts_of(by_phase(Recorder, Recorder, Options(), Options())(make_spec(), None, scratch))
    assert all(part.scratch is scratch for part in parts)


def test_the_flags_serve_a_model(llama: Reference) -> None:
    """Both flags, and prompts in chunks, so that decodes and prefills share steps: transformers' tokens come out."""
    engine = start(
        llama.path,
        decode_attention_backend=("torch",),
        prefill_attention_backend=("torch",),
        max_num_batched_tokens=32,
    )
    try:
        assert tokens_of(run(engine, llama.prompts)) == llama.tokens
    finally:
        engine.shutdown()


def test_either_flag_joins_it_with_the_choice_for_all(llama: Reference) -> None:
    plugins = load_plugins(())
    checkpoint = json.loads((llama.path / "config.json").read_text())
    for named, joined in [((), False), (("torch",), True)]:
        config = EngineConfig(model=str(llama.path), decode_attention_backend=named)
        assembly = assemble(config, plugins, checkpoint, DeviceInfo("cpu", "CPU"))
        ((selection, _),) = assembly.attention
        assert (selection.cls.__name__ == "ByPhase") is joined
        shown = [one.as_dict() for one in assembly.selections if one.kind == "attention"]
        assert [one.get("phase") for one in shown] == (["decode", "prefill"] if joined else [None])


def test_why_shows_both_selections(llama: Reference, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cpu", "--plugins", "", "--attention-backend", "torch", "--prefill-attention-backend", "torch"]
    assert main(["plugins", "why", str(llama.path), *flags]) == 0
    out = capsys.readouterr().out
    assert "attention backend for decode: torch [builtin" in out
    assert "attention backend for prefill: torch [builtin" in out


def test_a_named_backend_that_cannot_serve_is_told_with_its_flag(
    llama: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchAttention, "why_not", staticmethod(lambda spec, options: "it is Monday"))
    config = EngineConfig(model=str(llama.path), decode_attention_backend=("torch",))
    checkpoint = json.loads((llama.path / "config.json").read_text())
    with pytest.raises(PluginError, match=r"For decode \(--decode-attention-backend\): .*torch: it is Monday"):
        assemble(config, load_plugins(()), checkpoint, DeviceInfo("cpu", "CPU"))
