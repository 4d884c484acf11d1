"""The kit's oracle agrees with torch's own attention, and its cases are what they say."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from octavo.testing.attention import AttentionCase, as_it_lies, attend, make_case, make_spec

MIXED = [(1, 37), (1, 40), (6, 30)]


def test_the_oracle_is_torchs_attention() -> None:
    """In float64, of a chunk that follows a prefix."""
    spec = make_spec(num_heads=6, num_kv_heads=2)
    q, k, v = (torch.randn(n, h, 64, dtype=torch.float64) for n, h in ((5, 6), (20, 2), (20, 2)))
    mask = torch.ones(5, 20, dtype=torch.bool).tril(15)
    heads = [x.transpose(0, 1) for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v, spec)[0], wanted.transpose(0, 1))


def test_the_oracle_by_hand() -> None:
    """Two keys with scores 0 and 1, then a softcap and a window on them."""
    q, k, v = torch.ones(1, 1, 1), torch.tensor([[[0.0]], [[1.0]]]), torch.tensor([[[0.0]], [[1.0]]])
    common: dict[str, Any] = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 1}
    out, lse, spread, scores = attend(q, k, v, make_spec(**common))
    assert out.item() == spread.item() == pytest.approx(math.e / (1 + math.e))
    assert lse.item() == pytest.approx(math.log(1 + math.e))
    assert scores.item() == 1
    capped = math.exp(0.5 * math.tanh(2))
    assert attend(q, k, v, make_spec(**common, softcap=0.5))[0].item() == pytest.approx(capped / (1 + capped))
    assert attend(q, k, v, make_spec(**common, window=1))[0].item() == 1


def test_cases_hold_only_what_is_used() -> None:
    """The null block and all unused slots are NaN, entries behind the window null, and blocks nobody's twice."""
    case = make_case(make_spec(window=20, block_size=8), [(1, 61), (4, 32)], padding_requests=1)
    table = case.batch.block_tables[0]
    assert table[0].tolist()[:5] == [0] * 5 and table[0, 5] != 0
    assert table[1].tolist()[0] == 0 and table[1, 1] != 0
    live = table[table != 0].tolist()
    assert len(set(live)) == len(live)
    assert case.kv.k[0].isnan().all()
    last = case.kv.k[int(table[0, 7])]
    assert last[:, 5:].isnan().all() and not last[:, :5].isnan().any()


def test_cases_refuse_decodes_that_do_not_come_first() -> None:
    with pytest.raises(ValueError, match="come first"):
        make_case(make_spec(), [(2, 5), (1, 4)])


def test_cases_repeat() -> None:
    first, second, other = (make_case(make_spec(), MIXED, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.q, second.q) and torch.equal(first.batch.slots[0], second.batch.slots[0])
    assert not torch.equal(first.q, other.q)


def test_a_moved_case_lies_as_before() -> None:
    """Views stay views, with their strides, offsets and neighbours; the case itself is not touched."""
    case = make_case(make_spec(), MIXED, padding_tokens=1)
    moved: AttentionCase = case.to("cpu")
    for one, two in ((case.q, moved.q), (case.new[1], moved.new[1]), (case.batch.slots[0], moved.batch.slots[0])):
        assert torch.equal(one, two) and one.stride() == two.stride()
        assert one.storage_offset() == two.storage_offset() and one.data_ptr() != two.data_ptr()
    assert moved.kv.k.data_ptr() == moved.kv.raw.data_ptr() != case.kv.raw.data_ptr()
    moved.q.zero_()
    assert case.q.any()
    whole = torch.arange(6)
    assert as_it_lies(whole[1::2], "cpu").as_strided((6,), (1,), 0).tolist() == whole.tolist()


def test_the_oracle_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompts are attended some queries at a time."""
    spec = make_spec(window=9)
    whole = make_case(spec, [(1, 30), (17, 40)]).expected
    monkeypatch.setattr("octavo.testing.attention._SCORES_AT_ONCE", 5 * spec.num_heads * 40)
    parts = make_case(spec, [(1, 30), (17, 40)]).expected
    torch.testing.assert_close(parts.out, whole.out)
    torch.testing.assert_close(parts.lse, whole.lse)
    torch.testing.assert_close(parts.scores, whole.scores)
