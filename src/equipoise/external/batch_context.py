"""The batch that a forward of the model runs on: tells each router how its tokens lie in sequences and documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..autograd.router_state import ForwardPass
from ..autograd.token_layout import TokenLayout, TokenPlacement
from ..errors import InputError
from ..torch_internals import current_backward
from .call_arguments import CallArguments
from .padding import mask_of_calls, padding_unknown
from .token_kinds import token_kinds

__all__ = ["BatchContext", "declared_layout"]


class BatchContext:
    """Records the arguments of each forward of a model, and of the modules on the way to its routers, by hooks.

    A wrapper may call its inner model with another batch than its own (image tokens inserted into text), so a router's
    tokens are looked up in the innermost call with as many tokens. A mask that is not understood there is looked for
    further out, and is an error where none is understood.

    Every forward in training mode with gradient between two taps belongs to the loss that is tapped, so a pair of
    passes (chosen and rejected answers) counts as one micro-batch of both; each pass has its own layout. A forward for
    a metric belongs in ``torch.no_grad()`` or ``model.eval()``, where nothing is counted. A recompute in backward uses
    the placement of its forward (``RouterState.placed``), as the model may have run on other tokens since.

    Args:
        model: the model that a balancer was given.
        routers: names of its routers.
    """

    def __init__(self, model: nn.Module, routers: Sequence[str]) -> None:
        self.before_forward: list[Callable[[], None]] = []  # called before each forward of the model
        self.backward_id = -1  # of the backward that recomputes the model; -1 in forward
        self.declared: TokenLayout | None = None  # by the user with balancer.layout(), in place of what is read
        self.declared_used = False
        self.reads_kinds = False  # a policy of the routers is of one class of tokens
        self.forward_pass: ForwardPass | None = None
        self._placed: dict[tuple[int, int, bool | None], TokenPlacement] = {}  # of this forward, for all of its layers
        self._on_devices: dict[tuple[int, torch.device], tuple[TokenPlacement, TokenPlacement]] = {}
        self._pieces: dict[str, _Piece] = {}  # of routers that see a forward's tokens in several calls
        self._calls: dict[str, CallArguments] = {}
        self._hooks = []
        modules = dict(model.named_modules())
        for name in {"", *(parent for router in routers for parent in _parents(router))}:
            if not name or CallArguments.takes_tokens(modules[name]):
                call = self._calls[name] = CallArguments(modules[name], outermost=not name)
                self._hooks += [
                    modules[name].register_forward_pre_hook(_Enter(self, call), with_kwargs=True),
                    modules[name].register_forward_hook(_Leave(self, call), always_call=True),
                ]

    def calls_around(self, router: str) -> tuple[CallArguments, ...]:
        """The calls around a router, innermost first."""
        return tuple(self._calls[name] for name in (*reversed(_parents(router)), "") if name in self._calls)

    @property
    def runs(self) -> bool:
        """Whether a forward of the model, or of a part with the routers, is running."""
        return any(call.running for call in self._calls.values())

    def enter(self, call: CallArguments, args: tuple, kwargs: dict[str, Any]) -> None:
        """A recorded module is called."""
        if not self.runs:
            for callback in self.before_forward:
                callback()
            if not torch.compiler.is_compiling():
                self.backward_id, self._pieces = current_backward(), {}
            if self.forward_pass is not None and not call.outermost:  # a training loop with a head of its own
                self.forward_pass.enter()
        self._placed, self._on_devices = {}, {}
        call.record(args, kwargs)
        call.running = True

    def leave(self, call: CallArguments) -> None:
        """A recorded module returns or raises."""
        call.running = False
        if not self.runs:
            if self.forward_pass is not None and not call.outermost:
                self.forward_pass.leave()
            self._check_pieces()

    def place(
        self, calls: Sequence[CallArguments], tokens: int, images: bool | None = None, *, router: str = ""
    ) -> TokenPlacement:
        """How the tokens of a router's call lie in the forward that runs; one sequence where nothing is known.

        Args:
            calls: see `calls_around`.
            tokens: rows of the router's input.
            images: whether it gets the tokens of images only (True) or of text only (False).
            router: its name, to follow one that sees the tokens of a forward in pieces.
        """
        if torch.compiler.is_compiling():
            return self._place(calls, tokens, images, "")
        key = (id(calls[0]), tokens, images)
        if key in self._placed:
            return self._placed[key]
        placed = self._place(calls, tokens, images, router)
        if placed.piece is None:
            self._placed[key] = placed
        return placed

    def _place(self, calls: Sequence[CallArguments], tokens: int, images: bool | None, router: str) -> TokenPlacement:
        if self.declared is not None and _fits(self.declared, tokens):
            self.declared_used = True
            return TokenPlacement(tokens, self.declared.checked(tokens))
        around = [call for call in calls if call.shape is not None]
        around = [call for call in around if call.running] or around
        if images is not None and (placed := _of_modality(around, tokens, images, self.reads_kinds)) is not None:
            return placed
        first = next((call for call in around if call.num_tokens == tokens), None)
        if first is not None:
            alike = [call for call in around if call.shape == first.shape]
            mask_BS, unread = mask_of_calls(alike)
            document_BS, inside_BS = next(
                (pair for call in alike if (pair := call.documents())[0] is not None), (None, None)
            )
            if mask_BS is None:
                mask_BS = inside_BS
            classes = token_kinds(alike) if self.reads_kinds else None
            layout = TokenLayout(alike[0].rows, _flat(mask_BS), _flat(document_BS), classes=classes)
            return TokenPlacement(tokens, layout, unread=unread)
        if not around:
            return TokenPlacement(tokens, TokenLayout())
        return self._piece([call for call in around if call.shape == around[0].shape], tokens, router)

    def _piece(self, calls: list[CallArguments], tokens: int, router: str) -> TokenPlacement:
        """For a router with fewer tokens than the model. With padding, only pieces of a single row can be located."""
        total, (mask_BS, unread) = calls[0].num_tokens, mask_of_calls(calls)
        start = self._pieces.get(router, _Piece(0, total, False)).stop if router else 0
        if router:
            self._pieces[router] = _Piece(start + tokens, total, mask_BS is not None)
        if mask_BS is None and not unread:
            return TokenPlacement(tokens, TokenLayout(), piece=start)
        if mask_BS is not None and router and len(mask_BS) == 1 and start + tokens <= total:
            return TokenPlacement(tokens, TokenLayout(None, mask_BS[0, start : start + tokens]), piece=start)
        return TokenPlacement(tokens, TokenLayout(), piece=start, unread=unread or f"a mask of {total} tokens")

    def _check_pieces(self) -> None:
        for router, piece in self._pieces.items():
            if piece.masked and piece.stop != piece.total:
                self._pieces = {}
                raise padding_unknown(router, piece.stop, f"a mask of {piece.total} tokens")

    def on(self, placed: TokenPlacement, device: torch.device) -> TokenPlacement:
        """The same on a router's device; its tensors are moved once a forward."""
        tensors = (*placed.batch.tensors, *(() if placed.rows_T is None else (placed.rows_T,)))
        if all(tensor.device == device for tensor in tensors):
            return placed
        rows_T = None if placed.rows_T is None else placed.rows_T.to(device)
        if torch.compiler.is_compiling():
            return placed._replace(batch=placed.batch.on(device), rows_T=rows_T)
        key = (id(placed), device)
        if key not in self._on_devices:  # kept with the original, so that its id is not reused
            self._on_devices[key] = (placed, placed._replace(batch=placed.batch.on(device), rows_T=rows_T))
        return self._on_devices[key][1]

    def remove(self) -> None:
        """Removes the hooks from the model."""
        for hook in self._hooks:
            hook.remove()


@contextmanager
def declared_layout(contexts: Iterable[BatchContext], layout: TokenLayout) -> Iterator[None]:
    """Inside the context, forwards use this layout in place of what is read from their arguments.

    Raises InputError where no router saw tokens that it fits.
    """
    before = [(one, one.declared, one.declared_used) for one in {id(context): context for context in contexts}.values()]
    for context, _, _ in before:
        context.declared, context.declared_used = layout, False
    try:
        yield
        if not any(context.declared_used for context, _, _ in before):
            mask_T = layout.token_mask_T
            raise InputError(
                expected="forwards inside balancer.layout() whose routers see the tokens that it is about",
                got=f"none that see {f'{len(mask_T)} tokens' if mask_T is not None else f'{layout.rows} sequences'}",
                do="pass a mask of the B * S tokens that reach a router, pictures and padding among them",
            )
    finally:
        for context, declared, used in before:
            context.declared, context.declared_used = declared, used


class _Piece(NamedTuple):
    """The part of a forward's tokens that a router has seen so far."""

    stop: int
    total: int
    masked: bool


class _Enter:
    """A hook as an object: copied and pickled models keep the hook, and the copy follows no context."""

    def __init__(self, context: BatchContext, call: CallArguments) -> None:
        self.context, self.call = context, call

    def __call__(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.context.enter(self.call, args, kwargs)

    def __reduce__(self):  # deepcopy uses it too
        return _Nothing, ()


class _Leave(_Enter):
    def __call__(self, _module: nn.Module, _args: tuple, _output: Any) -> None:
        self.context.leave(self.call)


class _Nothing:
    def __call__(self, *_: Any) -> None:
        return


def _parents(name: str) -> list[str]:
    """Names of the modules around one, outermost first, without the model itself."""
    return [name[:at] for at, letter in enumerate(name) if letter == "."]


def _fits(layout: TokenLayout, tokens: int) -> bool:
    if layout.token_mask_T is not None:
        return len(layout.token_mask_T) == tokens
    return tokens % layout.rows == 0


def _flat(x_BS: Tensor | None) -> Tensor | None:
    return None if x_BS is None else x_BS.reshape(-1)


def _of_modality(calls: Sequence[CallArguments], tokens: int, images: bool, reads_kinds: bool) -> TokenPlacement | None:
    """For a router of image or text tokens only: which tokens of the batch are its own."""
    for i, call in enumerate(calls):
        if not (isinstance(call.image_tokens, Tensor) and call.image_tokens.shape == call.shape):
            continue
        own_T = (call.image_tokens != 0).reshape(-1) == images
        rows_T = own_T.nonzero().view(-1)
        if len(rows_T) == tokens:
            alike = [other for other in calls[i:] if other.shape == call.shape]
            mask_BS, unread = mask_of_calls(alike)
            valid_T = torch.ones_like(own_T) if mask_BS is None else mask_BS.reshape(-1)
            classes = token_kinds(alike) if reads_kinds else None
            layout = TokenLayout(call.rows, own_T & valid_T, _flat(call.documents()[0]), valid_T, classes)
            return TokenPlacement(tokens, layout, rows_T, unread=unread)
    return None
