"""Where padding and documents are read: at the call that has the router's tokens, by name or position, or refused."""

from __future__ import annotations

import re
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from _rounding import OURS, Float64
from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias, InputError, StateError, TokenLayout
from integrations.hf._cases import double, inputs, quiet, same_gradients
from integrations.hf._law import Twin, law
from integrations.hf.families import build

COEF, FAMILY = 0.3, "qwen3_moe"
LENGTHS = [5, 1, 9, 3]  # of the documents of a pack


class Wrapper(nn.Module):
    """Five tokens of a picture before the words, with a mask of its own making, as multimodal wrappers do."""

    def __init__(self, llm: nn.Module, kind: str = "mask") -> None:
        super().__init__()
        self.llm, self.kind = llm, kind
        self.project = nn.Linear(4, llm.config.hidden_size, dtype=torch.float64)
        nn.init.ones_(self.project.weight), nn.init.zeros_(self.project.bias)

    def whole_mask(self, mask_BS: Tensor) -> Tensor:
        return torch.cat([torch.ones(len(mask_BS), 5, dtype=mask_BS.dtype), mask_BS], dim=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        pictures = self.project(torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4)).expand(
            len(input_ids), -1, -1
        )
        words = self.llm.get_input_embeddings()(input_ids)
        mask = None if attention_mask is None else self.whole_mask(attention_mask)
        if mask is not None and self.kind == "who sees whom":
            length = mask.shape[1]
            mask = torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]
        return self.llm(inputs_embeds=torch.cat([pictures, words], dim=1), attention_mask=mask)


def models() -> tuple[nn.Module, Twin]:
    return double(build(FAMILY)).train(), Twin(double(build(FAMILY)).train(), FAMILY)


def groups(scope: str, batch: int, length: int) -> list[int]:
    return [0] * (batch * length) if scope == "global_batch" else [t // length for t in range(batch * length)]


def own_loss(output: Any) -> Tensor:
    x_BSD = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return x_BSD.square().mean() + x_BSD.mean()


def check(
    model: Any,
    twin: Any,
    run: Any,
    twin_run: Any,
    group_T: list[int],
    mask_T: list[bool],
    scope: str,
    bound: float = OURS,
    **more: Any,
) -> None:
    """One step of ``run(model)`` against ``twin_run(twin.model)`` with the law written out."""
    with quiet(), Float64():
        balancer = Balancer(model, [AuxLoss(scope, COEF)], **more)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        balancer.tap(own_loss(run(model))).backward()
        optimizer.step()
        own = own_loss(twin_run(twin.model))
        (own + law(twin, group_T, mask_T, COEF)).backward()
    inner = model.llm if isinstance(model, Wrapper) else model
    same_gradients(inner, twin.model, bound)
    assert [c.tolist() for c in balancer.load()] == list(twin.counts(mask_T).values())
    assert balancer.metrics()["balance/tokens"] == sum(mask_T)


@pytest.mark.parametrize("scope", ["global_batch", "sequence"])
def test_a_mask_passed_by_position(scope):
    model, twin = models()
    given = inputs()
    run = lambda net: net(given["input_ids"], given["attention_mask"])  # noqa: E731
    batch, length = given["input_ids"].shape
    mask_T = given["attention_mask"].bool().view(-1).tolist()
    check(model, twin, run, run, groups(scope, batch, length), mask_T, scope)


@pytest.mark.parametrize("scope", ["global_batch", "sequence"])
@pytest.mark.parametrize("how", ["itself", "part", "example"])
def test_a_wrapper_that_hands_on_another_batch(scope, how):
    """The routers see picture and words; the mask that counts is the one of the call inside."""
    net, twin = models()
    model, given = Wrapper(net).train(), inputs()
    batch, length = given["input_ids"].shape
    mask_T = model.whole_mask(given["attention_mask"]).bool().view(-1).tolist()
    more = {"itself": {}, "part": {"part": "llm"}, "example": {"example": inputs()}}[how]
    plain = Wrapper(twin.model).train()
    check(
        model,
        twin,
        lambda m: m(**given),
        lambda _: plain(**given),
        groups(scope, batch, length + 5),
        mask_T,
        scope,
        **more,
    )


def test_a_part_is_one_of_the_model():
    model = nn.ModuleDict({"policy": build(FAMILY), "reference": build(FAMILY)})
    with quiet():
        balancer = Balancer(model, [AuxLoss()], part="policy")
        assert re.search(r"^routers +2$", balancer.describe(), re.M)
        balancer.remove()
    with pytest.raises(ConfigError, match="policy, reference"):
        Balancer(model, [AuxLoss()], part="llm")
    with pytest.raises(ConfigError, match=r"policy.model, reference.model"):
        Balancer(model, [AuxLoss()], part="model")


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_mask_that_says_who_sees_whom_is_refused_and_may_be_said(wrapped):
    """Nothing in four dimensions tells padding; the remedy is followed to the letter."""
    net, twin = models()
    given = inputs()
    batch, length = given["input_ids"].shape
    plain = Wrapper(twin.model, "who sees whom").train()
    model: Any = Wrapper(net, "who sees whom").train() if wrapped else net
    if not wrapped:
        sees = torch.ones(length, length, dtype=torch.bool).tril() & given["attention_mask"].bool()[:, None, None, :]
        given = given | {"attention_mask": sees}
        mask_T = inputs()["attention_mask"].bool().view(-1)
    else:
        mask_T = model.whole_mask(given["attention_mask"]).bool().view(-1)
    with quiet(), Float64():
        balancer = Balancer(model, [AuxLoss("sequence", COEF)])
        with pytest.raises(
            InputError, match=r"who sees whom(.|\n)*with balancer.layout\(TokenLayout\(B, token_mask_T\)\)"
        ):
            model(**given)
        with torch.no_grad():
            model(**given)  # that counts for nobody
        balancer.remove()

    with quiet(), Float64():
        balancer = Balancer(model, [AuxLoss("sequence", COEF)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with balancer.layout(TokenLayout(batch, mask_T)):
            output = model(**given)
        balancer.tap(own_loss(output)).backward()
        optimizer.step()
        own = own_loss(plain(**given) if wrapped else twin.model(**given))
        rows = len(mask_T) // batch
        (own + law(twin, groups("sequence", batch, rows), mask_T.tolist(), COEF)).backward()
    same_gradients(net, twin.model, OURS)
    assert [c.tolist() for c in balancer.load()] == list(twin.counts(mask_T.tolist()).values())


def pack() -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """(ids, positions, boundaries, document of each token)."""
    ids = inputs(batch=1, length=sum(LENGTHS), padded=False)["input_ids"]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    boundaries = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    return ids, positions, boundaries, [d for d, n in enumerate(LENGTHS) for _ in range(n)]


@pytest.mark.parametrize("how", ["positions", "positions from 2", "boundaries", "seq_idx", "boundaries by the inner"])
def test_documents_of_a_pack(how):
    ids, positions, boundaries, document_T = pack()
    told: dict[str, Any] = {
        "positions": {"position_ids": positions},
        "positions from 2": {"position_ids": positions + 2},
        "seq_idx": {"seq_idx": torch.tensor([document_T], dtype=torch.int32)},
    }.get(how, {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 9, "max_length_k": 9})
    model, twin = models()
    run = lambda net: (net.model if "inner" in how else net)(input_ids=ids, **told)  # noqa: E731
    check(model, twin, run, run, document_T, [True] * len(document_T), "document")


def test_what_lies_behind_the_last_boundary_is_padding():
    ids, _, boundaries, document_T = pack()
    model, twin = models()
    run = lambda net: net(input_ids=ids, cu_seq_lens_q=boundaries[:-1])  # noqa: E731
    check(model, twin, run, run, document_T, [d < len(LENGTHS) - 1 for d in document_T], "document")


def test_pictures_inside_a_document_do_not_end_it():
    """Of three axes (time, height, width) the first stands still inside a picture."""
    from equipoise.external.call_arguments import document_starts

    text, picture = torch.arange(2).expand(3, -1), torch.tensor([[2, 2, 2, 2], [2, 2, 3, 3], [2, 3, 2, 3]])
    after = torch.tensor([4, 5]).expand(3, -1)
    axes_AS = torch.cat([text, picture, after, text, torch.zeros(3, 1, dtype=torch.long), text], dim=1)
    begins = document_starts(axes_AS[:, None])[0].nonzero().view(-1).tolist()
    assert begins == [0, 8, 10, 11]
    with_text = torch.cat([torch.arange(axes_AS.shape[1])[None], axes_AS])
    assert document_starts(with_text[:, None])[0].nonzero().view(-1).tolist() == [0], (
        "the first of four is that of text"
    )


@pytest.mark.parametrize("scope", ["sequence", "global_batch"])
def test_a_loop_with_a_head_of_its_own(scope):
    """It calls the backbone and not the model; a pass without gradient of that is nobody's."""
    model, twin = models()
    given = inputs()
    batch, length = given["input_ids"].shape
    mask_T = given["attention_mask"].bool().view(-1).tolist()

    def run(net: Any) -> Any:
        output = net.model(**given)
        with torch.no_grad():
            net.model(**inputs(3, padded=False))
        return output

    check(model, twin, run, lambda net: net.model(**given), groups(scope, batch, length), mask_T, scope)


def test_a_part_that_is_told_nothing_of_tokens_is_refused():
    with quiet():
        model = build(FAMILY).train()
        balancer = Balancer(model, [AuxLoss("global_batch", COEF)])
        with pytest.raises(StateError, match=r"a call of a part of it(.|\n)*part="):
            model.model.layers[0].mlp(torch.randn(2, 3, model.config.hidden_size))
    assert balancer.step_count == 0


class Tiled(torch.autograd.Function):
    """A block on one tile of a sequence at a time, run again in backward: how memory is saved on long ones."""

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, block: Any, tiles: int) -> Tensor:
        ctx.block, ctx.tiles = block, tiles
        ctx.save_for_backward(x_BSD)
        with torch.no_grad():
            return torch.cat([block(x.contiguous()) for x in x_BSD.chunk(tiles, dim=1)], dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x_BSD,) = ctx.saved_tensors
        out = []
        for x, grad in zip(x_BSD.chunk(ctx.tiles, dim=1), grads[0].chunk(ctx.tiles, dim=1), strict=True):
            with torch.enable_grad():
                x = x.detach().contiguous().requires_grad_()
                torch.autograd.backward(ctx.block(x), grad)
            out.append(x.grad)
        return torch.cat(out, dim=1), None, None


def tile(model: nn.Module, *, again: bool, tiles: int = 3) -> None:
    for layer in model.model.layers:
        plain = layer.mlp.forward

        def forward(_self: Any, x_BSD: Tensor, plain: Any = plain) -> Tensor:
            if again:
                return Tiled.apply(x_BSD, plain, tiles)
            return torch.cat([plain(x.contiguous()) for x in x_BSD.chunk(tiles, dim=1)], dim=1)

        layer.mlp.forward = types.MethodType(forward, layer.mlp)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [9, 8])  # tiles of 3, 3, 3 and of 3, 3, 2
def test_tokens_that_come_in_tiles(again, padded, length):
    model, twin = models()
    tile(model, again=again)
    given = inputs(batch=1, length=length, padded=False)
    given["attention_mask"][0, 5:] = 0 if padded else 1
    run = lambda net: net(**given)  # noqa: E731
    bound = 1e-6 if again else OURS  # what runs inside a backward keeps the model's islands of fp32
    mask_T = given["attention_mask"].bool().view(-1).tolist()
    check(model, twin, run, run, [0] * length, mask_T, "global_batch", bound=bound)


def test_tiles_that_nothing_can_place_are_refused():
    with quiet():
        model = build(FAMILY).train()
        tile(model, again=False)
        balancer = Balancer(model, [AuxLoss("global_batch", COEF)])
        with pytest.raises(InputError, match=r"mask of 18 tokens(.|\n)*none where nothing is padded"):
            model(**inputs())  # three rows: a tile may be of one or of all
        balancer.remove()
        balancer = Balancer(model, [AuxLoss("micro_batch", COEF)])
        with pytest.raises(InputError, match=r"in pieces(.|\n)*global_batch"):
            model(input_ids=inputs(batch=1, length=9, padded=False)["input_ids"])
        balancer.remove()


def test_a_bias_counts_what_the_call_inside_says():
    """Nothing but a bias: its load leaves out the padding of a mask that was passed by position."""
    model, given = build(FAMILY).train(), inputs()
    with quiet():
        balancer = Balancer(model, [ExpertBias("proportional", rate=0.01)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        output = model(given["input_ids"], given["attention_mask"])
        balancer.tap(output.logits.square().mean()).backward()
        optimizer.step()
    tokens = int(given["attention_mask"].sum())
    assert [int(c.sum()) for c in balancer.load()] == [2 * tokens] * 2


def test_a_mask_of_a_cache_is_longer():
    """The end of the mask is that of the tokens at hand."""
    from equipoise.external.call_arguments import CallArguments
    from equipoise.external.padding import mask_of_call

    call = CallArguments(build(FAMILY), outermost=True)
    call.record((), {"input_ids": torch.zeros(1, 2, dtype=torch.long), "attention_mask": torch.tensor([[1, 1, 1, 0]])})
    assert mask_of_call(call).tolist() == [[True, False]]


class Two(nn.Module):
    """Two stacks of one kind, each with its own tokens, in code of a user's own."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, input_ids: Tensor, attention_mask: Tensor, other_ids: Tensor, other_mask: Tensor | None) -> Any:
        first = self.one(input_ids=input_ids, attention_mask=attention_mask).logits
        return first.mean() + self.other(input_ids=other_ids, attention_mask=other_mask).logits.square().mean()


def test_two_models_of_a_wrapper_have_to_be_told_apart():
    model = Two(build(FAMILY), build("mixtral")).train()
    with quiet(), pytest.raises(ConfigError, match=r"'one', 'other'(.|\n)*part='one'"):
        Balancer(model, [AuxLoss()])
    with quiet():
        both = [Balancer(model, [AuxLoss()], part=name) for name in ("one", "other")]
    for balancer in both:
        balancer.remove()


def test_a_mask_of_other_tokens_that_are_as_many_is_not_taken():
    model, given, others = Two(build(FAMILY), build(FAMILY)).train(), inputs(), inputs(3)
    with quiet():
        balancer = Balancer(
            model, [AuxLoss()], example={**inputs(), "other_ids": inputs()["input_ids"], "other_mask": None}
        )
        with pytest.raises(InputError, match="not handed on"):
            model(**given, other_ids=others["input_ids"], other_mask=None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        loss = model(**given, other_ids=others["input_ids"], other_mask=torch.ones_like(given["attention_mask"]))
        balancer.tap(loss).backward()
        optimizer.step()
    assert [int(c.sum()) for c in balancer.load()] == [2 * 15] * 2 + [2 * 18] * 2


@pytest.mark.parametrize(
    ("mask", "counted"),
    [
        (torch.tensor([[1, 1, 1, 1, 0, 0]]), 12),  # one row for all
        (torch.zeros(3, 6).masked_fill(inputs()["attention_mask"] == 0, -torch.inf), None),  # added to scores
        (torch.ones(6, 6, dtype=torch.bool).tril(), None),
    ],
)
def test_masks_of_other_kinds(mask, counted):
    model = build(FAMILY).train()
    with quiet():
        balancer = Balancer(model, [AuxLoss()])
    from equipoise.external.padding import mask_of_calls

    (call, *_) = (call for call in balancer._layers[0].router._calls_around)
    call.record((), {"input_ids": inputs()["input_ids"], "attention_mask": mask})
    found, unread = mask_of_calls([call])
    if counted is None:
        assert found is None and "who sees whom" in unread
    else:
        assert found is not None and int(found.sum()) == counted and not unread


def test_a_batch_that_is_one_argument_is_opened():
    from equipoise.external.call_arguments import CallArguments
    from equipoise.external.padding import mask_of_call

    class Net(nn.Module):
        def forward(self, batch: dict) -> None:
            pass

    call = CallArguments(Net(), outermost=True)
    call.record((inputs(),), {})
    assert int(mask_of_call(call).sum()) == 15 and call.shape == (3, 6)


def test_what_is_said_and_fits_no_router_is_an_error():
    model, given = build(FAMILY).train(), inputs()
    with quiet():
        balancer = Balancer(model, [AuxLoss()])
        with (
            pytest.raises(InputError, match="none that see 10 tokens"),
            balancer.layout(TokenLayout(1, torch.ones(10) > 0)),
        ):
            model(**given)
        mask_T = given["attention_mask"].view(-1) > 0
        with balancer.layout(TokenLayout(3, mask_T)), torch.no_grad():
            with balancer.layout(TokenLayout(3, ~mask_T)):
                model(**given)
            model(**given)
            assert balancer._layers[0].router.batch_context.declared.token_mask_T is mask_T


def test_a_copy_goes_forward_without_its_head():
    import copy

    with quiet():
        model = build(FAMILY).train()
        balancer = Balancer(model, [AuxLoss()])
        twin = copy.deepcopy(model)
        for _ in range(2):
            twin.model(**inputs())
    assert balancer.step_count == 0


def test_biases_of_a_part_are_put_back_into_it(tmp_path):
    pytest.importorskip("safetensors")
    from equipoise.adapters.biases import load_biases
    from equipoise.storage.balancer_file import FILE, write_state

    biases = {f"model.layers.{i}.mlp.gate": torch.arange(8.0) + i for i in range(2)}
    write_state({"biases": biases}, tmp_path / FILE)
    model = nn.ModuleDict({"llm": build(FAMILY), "other": build(FAMILY)})
    with quiet():
        load_biases(model, tmp_path, part="llm")
        balancer = Balancer(model, [ExpertBias("proportional", rate=0.0)], part="llm")
    assert all(
        torch.equal(layer.router.expert_bias, bias)
        for layer, bias in zip(balancer._layers, biases.values(), strict=True)
    )
