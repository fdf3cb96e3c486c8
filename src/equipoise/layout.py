"""How the tokens of a call lie in sequences: read from the arguments of the modules on the way to a router."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import InputError
from .meter import ForwardPass, Placed, TokenLayout

__all__ = ["Layout", "Level", "not_read", "router_tokens", "saying"]

TOKENS = ("input_ids", "inputs_embeds")
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens", "cu_seqlens_q", "cu_seqlens")  # (N + 1,) where documents begin and end


def router_tokens(batch: Any) -> Tensor | int | None:
    """Tokens of a batch that are not padding, on its device; None where it holds neither ids nor embeddings.

    >>> int(router_tokens({"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}))
    3
    """
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask != 0).sum()
    ids = next((batch[key] for key in TOKENS if batch.get(key) is not None), None)
    return None if ids is None else ids.shape[0] * ids.shape[1]


class Level:
    """A module that is given tokens, on the way to the routers: the model, its decoder, one of two stacks.

    Understands, by name or by position, ``input_ids`` or ``inputs_embeds`` (B, S, ...); a 2-D ``attention_mask`` (B, S)
    whose zeros are padding; documents of a packed row by ``seq_idx`` (B, S), ``cu_seq_lens_q`` (N + 1,), or
    ``position_ids`` (B, S) that do not go on by one; ``moe_mm_token_type_ids`` (B, S), which tokens are of a picture.
    """

    def __init__(self, module: nn.Module, *, outermost: bool) -> None:
        parameters = list(inspect.signature(module.forward).parameters.values())
        self.names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self.outermost = outermost
        self.of_transformers = type(module).__module__.startswith("transformers.")
        self.open = False  # its forward runs
        self.shape: tuple[int, int] | None = None  # (B, S)
        self.takes_mask = False
        self.mask: Any = None
        self.positions: Any = None
        self.numbers: Any = None
        self.boundaries: Any = None
        self.kinds: Any = None

    @staticmethod
    def is_one(module: nn.Module) -> bool:
        return any(name in inspect.signature(module.forward).parameters for name in TOKENS)

    def note(self, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        tokens = next((given[k] for k in TOKENS if given.get(k) is not None), None)
        if tokens is None and self.outermost and args:
            tokens = args[0]
        self.shape = None
        if isinstance(tokens, Tensor) and tokens.dim() >= 2:
            self.shape = (tokens.shape[0], tokens.shape[1])
        self.takes_mask = "attention_mask" in given or "attention_mask" in self.names
        self.mask, self.positions = given.get("attention_mask"), given.get("position_ids")
        self.numbers = given.get("seq_idx")
        self.boundaries = next((given[k] for k in BOUNDARIES if given.get(k) is not None), None)
        self.kinds = given.get("moe_mm_token_type_ids")

    @property
    def tokens(self) -> int:
        return -1 if self.shape is None else self.shape[0] * self.shape[1]

    def mask_BS(self) -> Tensor | None:
        """True where a token is real; of a mask that spans a cache too, the end. None: not said, or not understood."""
        assert self.shape is not None
        if isinstance(self.mask, Tensor) and self.mask.dim() == 2 and self.mask.shape[1] >= self.shape[1]:
            return self.mask[:, -self.shape[1] :] != 0
        return None

    def documents(self) -> tuple[Tensor | None, Tensor | None]:
        """(B, S) the number of each token's document in the batch, and where it is in one; None where nobody said."""
        assert self.shape is not None
        batch, length = self.shape
        numbers, ends, positions = self.numbers, self.boundaries, self.positions
        if isinstance(numbers, Tensor) and numbers.shape == self.shape:
            return _numbered(_with_first(numbers[:, 1:] != numbers[:, :-1])), None
        if isinstance(ends, Tensor) and ends.dim() == 1:
            at_T = torch.arange(batch * length, device=ends.device)
            number_T = torch.searchsorted(ends.long(), at_T, right=True) - 1
            return number_T.clamp(min=0).view(batch, length), (at_T < ends[-1]).view(batch, length)
        if isinstance(positions, Tensor) and positions.dim() >= 2 and positions.shape[-1] == length:
            return _numbered(_begins(positions).expand(batch, -1)), None
        return None, None


class Layout:
    """Around each forward of a model, the batch at hand; its routers read it.

    A wrapper may hand its inner model another batch than it got (pictures before words), so a router reads the
    innermost call whose tokens are its own. A mask that is not understood there is looked for further out, and refused
    where it is found nowhere: of four dimensions it says who sees whom and not what is padding.

    Every forward in training mode with gradient between two taps belongs to the loss that is tapped, so a pair of
    passes (chosen and rejected answers) counts as one micro-batch of both; each pass has its own layout. A pass for a
    metric belongs in ``torch.no_grad()`` or ``model.eval()``: there it counts nothing. What runs again in backward is
    placed as it was in forward (``Meter.placed``), for the model may have run on other tokens since.
    """

    def __init__(self, model: nn.Module, routers: Sequence[str]) -> None:
        self.before_each: list[Callable[[], None]] = []  # called before each forward
        self.noted_in = -1  # the backward whose recompute called the model; -1 in forward
        self.said: TokenLayout | None = None  # by the user, over what was read
        self.forward_pass: ForwardPass | None = None
        self._placed: dict[tuple[int, int, bool | None], Placed] = {}  # of this forward, for all of its layers
        self._elsewhere: dict[tuple[int, torch.device], tuple[Placed, Placed]] = {}  # the same on other devices
        self._pieces: dict[str, _Piece] = {}  # router -> its tokens so far, where it sees a forward's in pieces
        self._levels: dict[str, Level] = {}
        self._hooks = []
        modules = dict(model.named_modules())
        for name in {"", *(parent for router in routers for parent in _parents(router))}:
            if not name or Level.is_one(modules[name]):
                level = self._levels[name] = Level(modules[name], outermost=not name)
                self._hooks += [
                    modules[name].register_forward_pre_hook(_Enter(self, level), with_kwargs=True),
                    modules[name].register_forward_hook(_Leave(self, level), always_call=True),
                ]

    def way_to(self, router: str) -> tuple[Level, ...]:
        """The levels around a router, innermost first."""
        return tuple(self._levels[name] for name in (*reversed(_parents(router)), "") if name in self._levels)

    @property
    def runs(self) -> bool:
        return any(level.open for level in self._levels.values())

    def enter(self, level: Level, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self.runs:
            for call in self.before_each:
                call()
            if not torch.compiler.is_compiling():
                self.noted_in, self._pieces = torch._C._current_graph_task_id(), {}
            if self.forward_pass is not None and not level.outermost:  # a loop with a head of its own
                self.forward_pass.enter()
        self._placed, self._elsewhere = {}, {}
        level.note(args, kwargs)
        level.open = True

    def leave(self, level: Level) -> None:
        level.open = False
        if not self.runs:
            if self.forward_pass is not None and not level.outermost:
                self.forward_pass.leave()
            self._check_pieces()

    def place(self, way: Sequence[Level], tokens: int, pictures: bool | None = None, *, router: str = "") -> Placed:
        """How a router's tokens lie in the forward that runs.

        Args:
            way: see `way_to`.
            tokens: rows of the router. One sequence without padding where nothing is known of them.
            pictures: whether it sees the tokens of pictures only, or those of text only.
            router: its name, to follow one that sees the tokens of a forward in pieces.
        """
        if torch.compiler.is_compiling():
            return self._place(way, tokens, pictures, "")
        key = (id(way[0]), tokens, pictures)
        if key in self._placed:
            return self._placed[key]
        placed = self._place(way, tokens, pictures, router)
        if placed.piece is None:
            self._placed[key] = placed
        return placed

    def _place(self, way: Sequence[Level], tokens: int, pictures: bool | None, router: str) -> Placed:
        if self.said is not None and _fits(self.said, tokens):
            return Placed(tokens, self.said)
        around = [level for level in way if level.shape is not None]
        around = [level for level in around if level.open] or around
        if pictures is not None and (placed := _of_kind(around, tokens, pictures)) is not None:
            return placed
        here = [level for level in around if level.tokens == tokens]
        if here:
            mask_BS, unread = _mask(here)
            document_BS, inside_BS = next(
                (two for level in here if (two := level.documents())[0] is not None), (None, None)
            )
            if mask_BS is None:
                mask_BS = inside_BS
            return Placed(tokens, TokenLayout(here[0].shape[0], _flat(mask_BS), _flat(document_BS)), unread=unread)
        if not around:
            return Placed(tokens, TokenLayout())
        return self._piece([level for level in around if level.shape == around[0].shape], tokens, router)

    def _piece(self, levels: list[Level], tokens: int, router: str) -> Placed:
        """Of a router that sees other tokens than the model: with padding, only pieces of one row can be told apart."""
        whole, (mask_BS, unread) = levels[0].tokens, _mask(levels)
        at = self._pieces.get(router, _Piece(0, whole, False)).until if router else 0
        if router:
            self._pieces[router] = _Piece(at + tokens, whole, mask_BS is not None)
        if mask_BS is None and not unread:
            return Placed(tokens, TokenLayout(), piece=at)
        if mask_BS is not None and router and len(mask_BS) == 1 and at + tokens <= whole:
            return Placed(tokens, TokenLayout(None, mask_BS[0, at : at + tokens]), piece=at)
        return Placed(tokens, TokenLayout(), piece=at, unread=unread or f"a mask of {whole} tokens")

    def _check_pieces(self) -> None:
        for router, piece in self._pieces.items():
            if piece.masked and piece.until != piece.whole:
                self._pieces = {}
                raise not_read(router, piece.until, f"a mask of {piece.whole} tokens")

    def on(self, placed: Placed, device: torch.device) -> Placed:
        """The same on a router's device, moved once a forward."""
        tensors = (*placed.batch[1:], placed.rows_T)
        if all(tensor is None or tensor.device == device for tensor in tensors):
            return placed
        rows_T = None if placed.rows_T is None else placed.rows_T.to(device)
        if torch.compiler.is_compiling():
            return placed._replace(batch=placed.batch.on(device), rows_T=rows_T)
        key = (id(placed), device)
        if key not in self._elsewhere:  # with what it was made of, whose id is not to be used again
            self._elsewhere[key] = (placed, placed._replace(batch=placed.batch.on(device), rows_T=rows_T))
        return self._elsewhere[key][1]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


@contextmanager
def saying(layouts: Iterable[Layout], lies: TokenLayout) -> Iterator[None]:
    """Over what these read in forwards inside."""
    layouts = list(layouts)
    for layout in layouts:
        layout.said = lies
    try:
        yield
    finally:
        for layout in layouts:
            layout.said = None


class _Piece(NamedTuple):
    """Of the tokens that a forward of the model has, those that came to a router so far."""

    until: int
    whole: int
    masked: bool


class _Enter:
    def __init__(self, layout: Layout, level: Level) -> None:
        self.layout, self.level = layout, level

    def __call__(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.layout.enter(self.level, args, kwargs)


class _Leave(_Enter):
    def __call__(self, _module: nn.Module, _args: tuple, _output: Any) -> None:
        self.layout.leave(self.level)


def not_read(router: str, tokens: int, unread: str) -> InputError:
    return InputError(
        expected="to know which tokens are padding",
        got=f"{unread}, and router {router!r}, which sees {tokens} tokens of it",
        do="pass attention_mask (B, S) with 0 for padding, or none where nothing is padded (packed rows: position_ids "
        "tell the documents); or say it around the forward: with balancer.layout(TokenLayout(B, token_mask_T)): ...",
    )


def _parents(name: str) -> list[str]:
    """Names of the modules around one, outermost first, the model itself left out."""
    return [name[:at] for at, letter in enumerate(name) if letter == "."]


def _fits(layout: TokenLayout, tokens: int) -> bool:
    if layout.token_mask_T is not None:
        return len(layout.token_mask_T) == tokens
    return tokens % layout.rows == 0


def _flat(x_BS: Tensor | None) -> Tensor | None:
    return None if x_BS is None else x_BS.reshape(-1)


def _mask(levels: Sequence[Level]) -> tuple[Tensor | None, str]:
    """(True where a token of these levels is real, or None: all are; what was passed and is not understood).

    A mask that transformers makes of none, or of one further out, is no news; one that a wrapper made is.
    """
    for level in levels:
        if (mask_BS := level.mask_BS()) is not None:
            return mask_BS, ""
    given = [i for i, level in enumerate(levels) if level.mask is not None]
    if not given:
        return None, ""
    around = next((level for level in levels[given[-1] + 1 :] if level.takes_mask), None)
    if around is not None and around.of_transformers:
        return None, ""
    mask = levels[given[-1]].mask
    shape = f" of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else ""
    return None, f"an attention_mask{shape} ({type(mask).__name__}) that says who sees whom and not what is padding"


def _of_kind(levels: Sequence[Level], tokens: int, pictures: bool) -> Placed | None:
    """Of a router that gets the tokens of pictures only, or of text only: which those are."""
    for i, level in enumerate(levels):
        if not (isinstance(level.kinds, Tensor) and level.kinds.shape == level.shape):
            continue
        here_T = (level.kinds != 0).reshape(-1) == pictures
        rows_T = here_T.nonzero().view(-1)
        if len(rows_T) == tokens:
            mask_BS, unread = _mask([other for other in levels[i:] if other.shape == level.shape])
            all_T = torch.ones_like(here_T) if mask_BS is None else mask_BS.reshape(-1)
            layout = TokenLayout(level.shape[0], here_T & all_T, _flat(level.documents()[0]), all_T)
            return Placed(tokens, layout, rows_T, unread=unread)
    return None


def _numbered(begins_BS: Tensor) -> Tensor:
    """Documents numbered in the batch, those of a row from the number of its first token on."""
    batch, length = begins_BS.shape
    start_B1 = torch.arange(batch, device=begins_BS.device).unsqueeze(1) * length
    return begins_BS.long().cumsum(dim=1) - 1 + start_B1


def _with_first(begins_BS: Tensor) -> Tensor:
    """The first token of a row begins a document."""
    return torch.cat([torch.ones_like(begins_BS[:, :1], dtype=torch.bool), begins_BS], dim=1)


def _begins(positions: Tensor) -> Tensor:
    """(B, S): where positions do not go on by one, which is how transformers tells packed documents apart too.

    Of three axes (time, height, width) the first stands still inside a picture: there, where it falls back, or all
    three are 0. Of four, the first is that of text.
    """
    axes_ABS = positions.reshape(-1, *positions.shape[-2:])
    first_BS = axes_ABS[0]
    if len(axes_ABS) == 3:
        return _with_first((first_BS[:, 1:] < first_BS[:, :-1]) | (axes_ABS[:, :, 1:] == 0).all(dim=0))
    return _with_first(first_BS[:, 1:] != first_BS[:, :-1] + 1)
