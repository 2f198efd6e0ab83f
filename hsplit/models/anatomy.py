"""The parts of a causal LM, found by running its own forward over stubs instead of being written down.

What a split model cannot give its layers is found here too, and refused by name: values that are made of token ids or
learned weights outside of the layers, and operations between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hsplit.errors import InputError, error_text
from hsplit.models.outer_model import LayerCall, OuterModel

# Forms in which layers return hidden states: a tensor, or a tuple that begins with it.
_FORMS = (0, 1, 2, 3)
# Tokens of the two batches that a forward is watched over; unlike, so that a transposed batch is seen.
_ROWS, _LENGTH = 2, 3
_PLAIN_ARGUMENTS = (int, float, bool, str, torch.dtype, torch.device, type(None))


@dataclass(frozen=True)
class Anatomy:
    """The parts of a causal LM, as its own forward uses them.

    Attributes:
        layers: path of the list of decoder layers.
        count: decoder layers.
        width: of the hidden states between layers.
        returns: 0 for layers that return a tensor, else the length of the tuple that they return.
        front: names of the parameters that make the first hidden state.
        tail: names of the parameters that make logits of the last one.
        plain: path of the final norm and name of the head's weight, where the tail is no more than ``norm(h) W^T``.
        hands_on: the model passes what a layer returns beside hidden states to the next one, which a split does not.
    """

    layers: str
    count: int
    width: int
    returns: int
    front: tuple[str, ...]
    tail: tuple[str, ...]
    plain: tuple[str, str] | None
    hands_on: bool


def anatomy_of(skeleton: nn.Module) -> Anatomy:
    """Find the parts of ``skeleton``, a causal LM on the meta device.

    Raises:
        InputError: it has no one list of decoder layers, or its layers need more than hidden states and positions; the
            text says what, and names no model.
    """
    config: Any = skeleton.config
    if getattr(config, "is_encoder_decoder", False):
        raise InputError("it is an encoder-decoder")
    candidates = list(_layer_lists(skeleton, int(config.get_text_config(decoder=True).num_hidden_layers)))
    if not candidates:
        raise InputError("it has no list of decoder layers")
    reasons = []
    for returns in _FORMS:
        try:
            return _watched(skeleton, candidates, returns)
        except InputError as error:
            reasons.append(str(error))
        except Exception as error:  # a form that the model's own code does not take fails anywhere in it
            reasons.append(f"its own forward fails over stubs: {error_text(error)}")
    told = [reason for reason in reasons if not reason.startswith("its own forward fails")]
    raise InputError((told or reasons)[0])


def _layer_lists(skeleton: nn.Module, count: int) -> Iterator[str]:
    """Paths of the lists of ``count`` modules that are in no other list."""
    inside: tuple[str, ...] = ()
    for path, module in skeleton.named_modules():
        if isinstance(module, nn.ModuleList) and not path.startswith(inside or ("\0",)):
            inside += (f"{path}.",)
            if len(module) == count:
                yield path


class _Watch(TorchFunctionMode):
    """Notes which parameters operations read, and spares the products with weights that are all zero.

    Attributes:
        place: 0 before the first layer, 1 between layers, 2 after the last one.
        read: places by the name of a parameter that is read there.
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self._names, self.place = names, 0
        self.read: dict[str, set[int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Attributes, such as the type, are no values.
        if getattr(func, "__name__", "") != "__get__":
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, nn.Parameter) and id(leaf) in self._names:
                    self.read.setdefault(self._names[id(leaf)], set()).add(self.place)
        if self.place == 2 and func is nn.functional.linear and isinstance(args[1], nn.Parameter):
            return args[0].new_zeros(*args[0].shape[:-1], args[1].shape[0])
        return func(*args, **kwargs)


@dataclass(frozen=True)
class _Step:
    """A module that has parameters, in the forward after the layers."""

    path: str
    module: nn.Module
    given: Tensor
    output: Tensor
    version: int


@dataclass
class _Pass:
    """One forward over stubs.

    Attributes:
        hidden: what reaches each layer.
        calls: its other arguments.
        returned: what is returned in its place.
        steps: modules after the layers.
        read: see :class:`_Watch`.
        hands_on: what is returned beside hidden states reaches the next layer.
        logits: of each token.
    """

    hidden: list[Tensor]
    calls: list[LayerCall]
    returned: list[Tensor]
    steps: list[_Step]
    read: dict[str, set[int]]
    hands_on: bool = False
    logits: Any = None


def _watched(skeleton: nn.Module, candidates: Sequence[str], returns: int) -> Anatomy:
    """Run the forward over stubs that return their hidden states in the form ``returns``."""
    path = _called_list(skeleton, candidates, returns)
    outer = OuterModel(skeleton, [path], returns, torch.float32)
    outer.gradients = True
    count = len(cast(nn.ModuleList, skeleton.get_submodule(path)))
    seen = _passed(outer, count, 1)
    outer.beside = tuple(torch.zeros(1) for _ in outer.beside)
    again = _passed(outer, count, 2)
    if again.hands_on:
        # Where layers take nothing as well as what others hand on, the model's proof decides.
        _check_calls(seen.calls, seen.calls)
    else:
        _check_calls(seen.calls, again.calls)
    _check_hidden(seen)
    for name, places in seen.read.items():
        if 1 in places:
            raise InputError(f"it computes with {name} between its layers")
    front, tail = (tuple(n for n in outer.names if place in seen.read.get(n, ())) for place in (0, 2))
    plain = _plain_tail(seen, outer, tail)
    return Anatomy(path, count, seen.hidden[0].shape[-1], returns, front, tail, plain, again.hands_on)


def _called_list(skeleton: nn.Module, candidates: Sequence[str], returns: int) -> str:
    """Find the one list whose modules a forward over text calls."""
    if len(candidates) == 1:
        return candidates[0]
    outer, called = OuterModel(skeleton, candidates, returns, torch.float32), set()
    for path in candidates:
        for stub in cast(nn.ModuleList, outer.model.get_submodule(path)):
            stub.register_forward_pre_hook(lambda *_, of=path: called.add(of))
    outer(torch.ones(_ROWS, _LENGTH, dtype=torch.int64), lambda index, hidden, call: hidden)
    if len(called) != 1:
        raise InputError("it has no one list of decoder layers")
    return str(called.pop())


def _passed(outer: OuterModel, count: int, token: int) -> _Pass:
    """Run one forward over a batch of the tokens ``token``, ``token + 1`` and so on."""
    watch = _Watch(outer.stand_ins)
    seen = _Pass([], [], [], [], watch.read)

    def visit(index: int, hidden: Tensor, call: LayerCall) -> Tensor:
        if index != len(seen.hidden):
            raise InputError("its layers are not called one after the other, once each")
        seen.hands_on |= any(tensor is other for tensor in call.tensors for other in outer.beside)
        seen.hidden.append(hidden)
        seen.calls.append(call)
        # A tensor of its own, so that it is seen whether the next layer gets it as it is.
        seen.returned.append(torch.zeros_like(hidden).requires_grad_())
        watch.place = 2 if index == count - 1 else 1
        return seen.returned[-1]

    def note(module: nn.Module, inputs: Any, output: Any, path: str) -> None:
        if watch.place == 2 and len(inputs) == 1 and isinstance(output, Tensor):
            seen.steps.append(_Step(path, module, inputs[0], output, output._version))

    handles = [
        module.register_forward_hook(partial(note, path=path))
        for path, module in outer.model.named_modules()
        if module._parameters and not list(module.children())
    ]
    ids = torch.arange(_ROWS * _LENGTH).view(_ROWS, _LENGTH) + token
    try:
        with watch:
            output = outer(ids, visit)
    finally:
        for handle in handles:
            handle.remove()
    if len(seen.hidden) != count:
        raise InputError("its layers are not called one after the other, once each")
    seen.logits = output.logits
    if tuple(seen.logits.shape[:2]) != (_ROWS, _LENGTH):
        raise InputError("it makes no logits of each token")
    return seen


def _plain_tail(seen: _Pass, outer: OuterModel, tail: tuple[str, ...]) -> tuple[str, str] | None:
    """Path of the norm and name of the head's weight, if what follows the layers is these two modules alone."""
    if len(seen.steps) != 2:
        return None
    norm, head = seen.steps
    handed_on = _is(norm.given, seen.returned[-1], 0) and _is(head.given, norm.output, norm.version)
    if type(head.module) is not nn.Linear or not handed_on or not _is(seen.logits, head.output, head.version):
        return None
    weight = outer.name_at(f"{head.path}.weight")
    known = {weight, *(name for name in tail if name.startswith(f"{norm.path}."))}
    return (norm.path, weight) if known == set(tail) else None


def _is(tensor: Tensor, other: Tensor, version: int) -> bool:
    """True if ``tensor`` is ``other`` as it was at ``version``, or a view of all of it."""
    return tensor.data_ptr() == other.data_ptr() and tensor.shape == other.shape and tensor._version == version


def _check_hidden(seen: _Pass) -> None:
    width = seen.hidden[0].shape[-1]
    for hidden in seen.hidden:
        if tuple(hidden.shape) != (_ROWS, _LENGTH, width):
            raise InputError(f"its layers pass on more than one hidden state a token: {list(hidden.shape)}")
    for returned, reached in zip(seen.returned, seen.hidden[1:], strict=False):
        if not _is(reached, returned, 0):
            raise InputError("it changes the hidden states between its layers")


def _check_calls(calls: Sequence[LayerCall], others: Sequence[LayerCall]) -> None:
    """Refuse arguments that depend on the tokens, or on learned values."""
    for call, other in zip(calls, others, strict=True):
        names = [*(str(i) for i in range(len(call.args))), *call.kwargs]
        pairs = zip(names, (*call.args, *call.kwargs.values()), (*other.args, *other.kwargs.values()), strict=True)
        for name, value, again in pairs:
            for leaf, leaf_again in zip(tree_leaves(value), tree_leaves(again), strict=True):
                if not isinstance(leaf, Tensor):
                    if not isinstance(leaf, _PLAIN_ARGUMENTS):
                        raise InputError(f"its layers are called with a {type(leaf).__name__} ({name})")
                elif leaf.requires_grad:
                    raise InputError(f"its layers need values of the tokens, or of weights outside of them ({name})")
                elif leaf.shape == leaf_again.shape and not torch.equal(leaf, leaf_again):
                    raise InputError(f"its layers need the token ids ({name})")
