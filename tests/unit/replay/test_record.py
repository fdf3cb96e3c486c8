"""A record of routing: cut, joined, moved, saved, and what is no record."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from equipoise import InputError, RoutingRecord
from equipoise.lab.training.routing_churn import LastRouting


def record_of(*lengths: int, top_k: int = 2) -> RoutingRecord:
    draw = torch.Generator().manual_seed(0)
    calls = [torch.rand(n, 6, generator=draw).topk(top_k).indices.to(torch.int16) for n in lengths]
    return RoutingRecord({"a": calls, "b": [5 - one for one in calls]})


def test_saved_and_loaded_it_is_the_same(tmp_path: Path):
    record = record_of(4, 6)
    torch.save(record.state_dict(), tmp_path / "record.pt")
    again = RoutingRecord(torch.load(tmp_path / "record.pt", weights_only=True))
    assert repr(again) == repr(record) == "RoutingRecord(2 routers, 2 calls, 10 tokens)"
    pairs = [pair for name in "ab" for pair in zip(again.ids[name], record.ids[name], strict=True)]
    assert len(pairs) == 4 and all(torch.equal(*pair) for pair in pairs)
    assert again.ids["a"][0].dtype == torch.int16 and record.to("cpu").ids["b"][1].device.type == "cpu"


def test_calls_and_tokens_are_taken_by_number_slice_and_mask():
    record = record_of(4, 4, 4)
    assert torch.equal(record[-1].ids["b"][0], record.ids["b"][2])
    assert record[1:].num_calls == 2 and torch.equal(record[1:].ids["a"][0], record.ids["a"][1])
    with pytest.raises(IndexError, match="call 3 of a record of 3"):
        record[3]
    mask_T = torch.tensor([True, False, True, True])
    assert torch.equal(record.tokens(mask_T).ids["a"][1], record.ids["a"][1][mask_T])
    assert RoutingRecord({})[:].num_calls == 0


def test_joined_lies_sequence_by_sequence():
    """Prompts of 3 tokens, then two steps of one: token s of sequence b is row b * S + s."""
    record = record_of(2 * 3, 2, 2)
    joined_BSK = record.joined(2, length=6).ids["a"][0].view(2, 6, 2)
    for b in range(2):
        by_loops = [record.ids["a"][0][b * 3 + s] for s in range(3)] + [record.ids["a"][c][b] for c in (1, 2)]
        assert torch.equal(joined_BSK[b, :5], torch.stack(by_loops)) and (joined_BSK[b, 5] == -1).all()
    assert record.joined(2).ids["b"][0].shape == (10, 2)


@pytest.mark.parametrize(("sequences", "length"), [(4, None), (2, 4)])
def test_what_cannot_be_joined(sequences: int, length: int | None):
    with pytest.raises(InputError, match=rf"(?s)calls of {sequences} sequences.*6, 2, 2 tokens at 'a'.*pass the B"):
        record_of(6, 2, 2).joined(sequences, length)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (torch.zeros(4, 2), "torch.float32 of shape"),
        (torch.zeros(2, 4, 2).long(), r"torch.int64 of shape \(2, 4, 2\)"),
        (torch.tensor([[0, 1], [-1, 2]]), r"\[-1, 2\], and 1 such rows"),
        (torch.tensor([[3, 3], [2, 2]]), r"\[3, 3\], and 2 such rows"),
    ],
    ids=["floats", "not flat", "half a row", "twice"],
)
def test_what_is_no_record(ids: torch.Tensor, said: str):
    with pytest.raises(InputError, match=rf"(?s)integer expert ids \(T, K\) in call 0 of 'a'.*got: {said}.*do: "):
        RoutingRecord({"a": [ids]})
    assert RoutingRecord({"a": [torch.tensor([[-1, -1], [0, 1]])]}).num_calls == 1
    assert RoutingRecord({"a": [torch.tensor([[2, 4, 4], [0, 1, 4]])]}).num_calls == 1, "4 may be no expert, twice"


def test_churn_is_the_share_of_choices_that_the_other_does_not_have():
    """Against sets, over calls of unlike length; tokens that either does not know are left out."""
    record, other = record_of(4, 6, top_k=3), record_of(6, 4, top_k=3)
    other = RoutingRecord({name: calls[::-1] for name, calls in other.ids.items()})  # other choices, the same shapes
    record.ids["a"][0][1] = -1
    other.ids["a"][1][2] = -1
    for name, share in record.churn(other).items():
        pairs = zip(*(torch.cat(one.ids[name]).tolist() for one in (record, other)), strict=True)
        known = [(set(new), set(old)) for new, old in pairs if -1 not in new + old]
        assert len(known) == (8 if name == "a" else 10)
        assert share == pytest.approx(sum(len(new - old) / 3 for new, old in known) / len(known))
        assert 0 < share < 1 and other.churn(record)[name] == pytest.approx(share)
    assert record.churn(record) == {"a": 0.0, "b": 0.0}
    assert record.churn(RoutingRecord({name: [one.flip(1) for one in record.ids[name]] for name in "ab"})) == {
        "a": 0.0,
        "b": 0.0,
    }, "the order of choices says nothing"
    nothing = RoutingRecord({"a": [torch.full((2, 1), -1)], "b": []})
    assert all(share != share for share in nothing.churn(nothing).values())


def test_a_choice_that_is_no_expert_is_neither_kept_nor_new():
    """Under top-p an id of E is none: a token with one expert that leaves it has changed all that it had."""
    new, old = ([torch.tensor([[0, 4, 4], [2, 3, 1]])], [torch.tensor([[1, 4, 4], [2, 0, 4]])])
    record = RoutingRecord({"gate": new})
    assert record.churn(RoutingRecord({"gate": old}), num_experts=4)["gate"] == pytest.approx((1 + 2 / 3) / 2)
    last = LastRouting()
    last.churn(old[0].view(1, 1, 2, 3), num_experts=4)
    assert last.churn(new[0].view(1, 1, 2, 3), num_experts=4) == [pytest.approx((1 + 2 / 3) / 2)]


@pytest.mark.parametrize(("experts", "kind"), [(256, torch.uint8), (255, torch.uint8), (32768, torch.int16)])
def test_ids_in_the_smallest_type_that_holds_them(experts, kind):
    """The lab keeps bytes for 256 experts, where E itself is one more than they hold; a record has two bytes."""
    new, old = (torch.tensor([[experts - 1, 1]]).to(kind), torch.tensor([[experts - 1, 0]]).to(kind))
    assert RoutingRecord({"gate": [new]}).churn(RoutingRecord({"gate": [old]}), experts)["gate"] == 0.5
    last = LastRouting()
    last.churn(old.view(1, 1, 1, 2), num_experts=experts)
    assert last.churn(new.view(1, 1, 1, 2), num_experts=experts) == [0.5]


def test_what_is_no_record_says_so():
    with pytest.raises(InputError, match="one sequence or more"):
        record_of(4, 6).joined(0)
    with pytest.raises(InputError, match=r"(?s)integer expert ids.*list"):
        RoutingRecord({"gate": cast(Any, [[[0, 1]]])})


@pytest.mark.parametrize("other", [record_of(4, 4), record_of(4), record_of(4, 6, top_k=1)])
def test_churn_of_other_tokens_calls_or_k_is_refused(other: RoutingRecord):
    with pytest.raises(InputError, match=r"(?s)the same routers, calls.*'a' 2 calls of \(4, 2\).*do: .*same batches"):
        record_of(4, 6).churn(other)
    with pytest.raises(InputError, match="'b' nothing here, 2 calls"):
        RoutingRecord({"a": record_of(4, 6).ids["a"]}).churn(record_of(4, 6))
    with pytest.raises(InputError, match="'a' nothing here, 0 calls of"):
        RoutingRecord({}).churn(RoutingRecord({"a": []}))


def test_the_call_that_differs_is_named_in_a_long_record():
    ids = [torch.zeros(4, 1, dtype=torch.long)] * 1000
    with pytest.raises(InputError, match="first in call 700") as raised:
        RoutingRecord({"a": ids}).churn(RoutingRecord({"a": [*ids[:700], ids[0][:3], *ids[701:]]}))
    assert len(str(raised.value)) < 500
