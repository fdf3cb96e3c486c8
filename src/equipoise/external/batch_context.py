"""How the tokens of a call lie in sequences: read from the arguments of the modules on the way to a router."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..autograd.router_state import ForwardPass
from ..autograd.token_layout import Placed, TokenLayout
from ..errors import InputError
from ..torch_internals import current_backward
from .call_arguments import Level

__all__ = ["Layout", "not_read", "saying"]


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
        self.heard = False  # whether that was of use to a router
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
                self.noted_in, self._pieces = current_backward(), {}
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
            self.heard = True
            return Placed(tokens, self.said)
        around = [level for level in way if level.shape is not None]
        around = [level for level in around if level.open] or around
        if pictures is not None and (placed := _of_kind(around, tokens, pictures)) is not None:
            return placed
        first = next((level for level in around if level.tokens == tokens), None)
        if first is not None:
            here = [level for level in around if level.shape == first.shape]
            mask_BS, unread = _mask(here)
            document_BS, inside_BS = next(
                (two for level in here if (two := level.documents())[0] is not None), (None, None)
            )
            if mask_BS is None:
                mask_BS = inside_BS
            return Placed(tokens, TokenLayout(here[0].rows, _flat(mask_BS), _flat(document_BS)), unread=unread)
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
    before = [(layout, layout.said, layout.heard) for layout in {id(layout): layout for layout in layouts}.values()]
    for layout, _, _ in before:
        layout.said, layout.heard = lies, False
    try:
        yield
        if not any(layout.heard for layout, _, _ in before):
            mask_T = lies.token_mask_T
            raise InputError(
                expected="forwards inside balancer.layout() whose routers see the tokens that it is about",
                got=f"none that see {f'{len(mask_T)} tokens' if mask_T is not None else f'{lies.rows} sequences'}",
                do="pass a mask of the B * S tokens that reach a router, pictures and padding among them",
            )
    finally:
        for layout, said, heard in before:
            layout.said, layout.heard = said, heard


class _Piece(NamedTuple):
    """Of the tokens that a forward of the model has, those that came to a router so far."""

    until: int
    whole: int
    masked: bool


class _Enter:
    """An object and not a function: copied and pickled models keep their hooks, and follow no layout of ours."""

    def __init__(self, layout: Layout, level: Level) -> None:
        self.layout, self.level = layout, level

    def __call__(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.layout.enter(self.level, args, kwargs)

    def __reduce__(self):  # deepcopy asks for it too
        return _Nothing, ()


class _Leave(_Enter):
    def __call__(self, _module: nn.Module, _args: tuple, _output: Any) -> None:
        self.layout.leave(self.level)


class _Nothing:
    def __call__(self, *_: Any) -> None:
        return


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

    A mask that transformers makes of none, or of one further out, is no news; one that a wrapper makes is. One of other
    tokens, as many by chance (another stack's), is not theirs.
    """
    for i, outer in enumerate(levels):
        if (mask_BS := outer.mask_BS()) is None:
            continue
        between = [level for level in levels[:i] if level.takes_mask and level.mask is None]
        if all(level.tokens_id == outer.tokens_id for level in between):
            return mask_BS, ""
        if outer.of_transformers:
            return None, ""
        return None, "an attention_mask of a call around it, whose tokens may be others and which was not handed on"
    given = next((i for i in reversed(range(len(levels))) if levels[i].mask is not None), None)
    if given is None:
        return None, ""
    around = next((level for level in levels[given + 1 :] if level.takes_mask), None)
    if around is not None and around.of_transformers:
        return None, ""
    mask, name = levels[given].mask, levels[given].mask_name
    shape = f" of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else ""
    kind = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
    return None, f"{name}{shape} ({kind}), which may say who sees whom and not what is padding"


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
            layout = TokenLayout(level.rows, here_T & all_T, _flat(level.documents()[0]), all_T)
            return Placed(tokens, layout, rows_T, unread=unread)
    return None
