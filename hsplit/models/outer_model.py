"""A causal LM without its decoder layers: embedding, layer arguments and tail by the model's own forward.

The decoder layers are replaced by stubs, and the model's own ``forward`` runs over them. What reaches the first stub is
the embedded batch, scale and learned positions included. What each stub is called with (masks, rotary tables, whatever
differs between kinds of layers) are that layer's arguments. What the model makes of the last stub's output are its
logits: norm, scale, cap and bias in the order that the model's authors wrote. So nothing about an architecture is
written down here a second time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from hsplit.errors import InputError


@dataclass(frozen=True)
class LayerCall:
    """Arguments of one decoder layer beside its hidden states.

    Attributes:
        name: keyword of the hidden states; ``None`` where they are the first positional argument.
        args: positional arguments after the hidden states.
        kwargs: keyword arguments.
    """

    name: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Call ``layer`` with hidden states ``(b, T, d)``; returns its hidden states, ``(b, T, d)``."""
        if self.name is None:
            output = layer(hidden, *self.args, **self.kwargs)
        else:
            output = layer(*self.args, **{self.name: hidden}, **self.kwargs)
        return cast(Tensor, output[0] if isinstance(output, tuple | list) else output)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> LayerCall:
        """Copy the call with every tensor ``t`` among its arguments replaced by ``change(t)``."""
        args, kwargs = tree_map_only(Tensor, change, (self.args, self.kwargs))
        return LayerCall(self.name, args, kwargs)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]


class Reached(Exception):
    """Ends a forward early."""


Visit = Callable[[int, Tensor, LayerCall], Tensor]
"""Called in the place of a layer, with its index, the hidden states that reach it, and its other arguments."""


class _Stub(nn.Module):
    """Stands for a decoder layer, of which everything but the call can still be asked."""

    def __init__(
        self, layer: nn.Module, index: int, called: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
    ) -> None:
        super().__init__()
        # Not registered: the layer's own parameters are no part of this.
        self.__dict__.update(_layer=layer, _index=index, _called=called)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_called"](self.__dict__["_index"], args, kwargs)


class OuterModel(nn.Module):
    """The model around its decoder layers.

    Parameters are held only where :meth:`hold` has given them values; while a forward runs, zeros without memory stand
    for the others, so that a holder can run the parts of the forward that need none of them.

    Args:
        skeleton: the causal LM on the meta device; not changed.
        layers: paths of the lists of layers to replace, one by default.
        returns: form in which layers return hidden states, see :class:`~hsplit.models.anatomy.Anatomy`.
        dtype: compute dtype.
    """

    def __init__(self, skeleton: nn.Module, layers: Sequence[str], returns: int, dtype: torch.dtype) -> None:
        super().__init__()
        config = skeleton.config
        self._returns, self._dtype = returns, dtype
        self._visit: Visit | None = None
        memo: dict[int, Any] = {id(config): config}
        for path in layers:
            found = cast(nn.ModuleList, skeleton.get_submodule(path))
            memo[id(found)] = nn.ModuleList(_Stub(layer, index, self._called) for index, layer in enumerate(found))
        self.model = copy.deepcopy(skeleton, memo).eval()
        self._slots: dict[str, list[tuple[nn.Module, str]]] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._named: dict[str, str] = {}
        names: dict[int, str] = {}
        for owner_name, owner in self.model.named_modules():
            for attribute, parameter in owner._parameters.items():
                if parameter is not None:
                    path = f"{owner_name}.{attribute}" if owner_name else attribute
                    name = self._named[path] = names.setdefault(id(parameter), path)
                    self._slots.setdefault(name, []).append((owner, attribute))
                    self._shapes[name] = parameter.shape
        for slots in self._slots.values():
            for owner, attribute in slots:
                owner._parameters[attribute] = None
        self._held: set[str] = set()
        # Zeros that stand for parameters require a gradient: shows which arguments are made of learned values.
        self.gradients = False
        self.stand_ins: dict[int, str] = {}
        # Stands for tokens where only shapes matter; one that the embedding has.
        self.any_token = 0
        # Returned beside hidden states by what stands for layers that return a tuple.
        self.beside: tuple[Tensor | None, ...] = (None,) * max(returns - 1, 0)

    # -- values -----------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all parameters outside of the layers, each once."""
        return tuple(self._slots)

    def name_at(self, path: str) -> str:
        """Name of the parameter at ``path``, which a tied one has elsewhere too."""
        return self._named[path]

    def paths_of(self, name: str) -> tuple[str, ...]:
        """Every path of the parameter ``name``: several where it is tied."""
        return tuple(path for path, found in self._named.items() if found == name)

    def shape(self, name: str) -> torch.Size:
        """Shape of a parameter."""
        return self._shapes[name]

    def hold(self, name: str, value: nn.Parameter) -> None:
        """Give the parameter ``name`` its values, in every place of the model that has it."""
        for owner, attribute in self._slots[name]:
            owner._parameters[attribute] = value
        self._held.add(name)

    def lend(self, name: str, value: nn.Parameter) -> None:
        """Give a parameter that is not held its values until the forward that is running ends."""
        for owner, attribute in self._slots[name]:
            owner._parameters[attribute] = value

    def held(self, name: str) -> nn.Parameter:
        """The parameter ``name``, where it is held."""
        owner, attribute = self._slots[name][0]
        return cast(nn.Parameter, owner._parameters[attribute])

    @property
    def held_names(self) -> tuple[str, ...]:
        """Names of the parameters held."""
        return tuple(name for name in self._slots if name in self._held)

    def persistent_buffers(self) -> dict[str, Tensor]:
        """Buffers that a checkpoint may hold, by name."""
        return {name: value for name, value in self.model.state_dict().items() if name not in self._named}

    def give(self, model: nn.Module) -> None:
        """Put the values held here into ``model``, a causal LM of the same configuration."""
        for name in self.held_names:
            for path in self.paths_of(name):
                owner, _, attribute = path.rpartition(".")
                setattr(model.get_submodule(owner), attribute, self.held(name))
        own = self.persistent_buffers()
        for name, buffer in model.named_buffers():
            if name in own:
                buffer.copy_(own[name])

    @contextmanager
    def _complete(self, device: torch.device) -> Iterator[None]:
        """Fill parameters that are not held with zeros without memory."""
        absent = [name for name in self._slots if name not in self._held]
        for name in absent:
            zeros = torch.zeros((), dtype=self._dtype, device=device).expand(self._shapes[name])
            parameter = nn.Parameter(zeros, requires_grad=self.gradients)
            self.stand_ins[id(parameter)] = name
            for owner, attribute in self._slots[name]:
                owner._parameters[attribute] = parameter
        try:
            yield
        finally:
            self.stand_ins.clear()
            for name in absent:
                for owner, attribute in self._slots[name]:
                    owner._parameters[attribute] = None

    # -- forward ----------------------------------------------------------------------------------------------------

    def _called(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._visit is not None
        name = None if args else "hidden_states"
        if name is not None and name not in kwargs:
            raise InputError("its layers are not called with hidden states")
        hidden = args[0] if name is None else kwargs[name]
        others = {key: value for key, value in kwargs.items() if key != name}
        output = self._visit(index, hidden, LayerCall(name, args[1:], others))
        return output if self._returns == 0 else (output, *self.beside)

    def forward(self, ids: Tensor, visit: Visit) -> Any:
        """Run the model's own forward over token ids ``(b, T)``, with ``visit`` in the place of every layer.

        Returns:
            The model's output, ``None`` where ``visit`` has ended the forward by raising :class:`Reached`.
        """
        self._visit = visit
        try:
            with self._complete(ids.device):
                return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except Reached:
            return None
        finally:
            self._visit = None

    def embed(self, ids: Tensor) -> Tensor:
        """Embed token ids ``(b, T)``: what reaches the first layer, ``(b, T, d)``."""
        reached: list[Tensor] = []

        def first(index: int, hidden: Tensor, call: LayerCall) -> Tensor:
            reached.append(hidden)
            raise Reached

        self(ids, first)
        return reached[0]

    @torch.no_grad()
    def layer_calls(self, rows: int, length: int, count: int, device: torch.device) -> list[LayerCall]:
        """Find the arguments of the first ``count`` layers for a batch ``(rows, length)`` of whole sequences.

        Sequences that are shorter are padded on the right, and attention is causal: no real token sees padding, so the
        arguments are those of a batch without any.
        """
        calls: list[LayerCall] = []

        def record(index: int, hidden: Tensor, call: LayerCall) -> Tensor:
            calls.append(call)
            if len(calls) == count:
                raise Reached
            return hidden

        self(torch.full((rows, length), self.any_token, device=device), record)
        return calls

    def logits(self, hidden: Tensor, last: int) -> Tensor:
        """Compute logits ``(n, vocabulary)`` of the last layer's output ``(n, d)``.

        Args:
            hidden: rows, each taken as a text of one token: nothing after the layers mixes tokens.
            last: index of the last layer.
        """

        def give(index: int, reached: Tensor, call: LayerCall) -> Tensor:
            return hidden.unsqueeze(1) if index == last else reached

        ids = torch.full((hidden.shape[0], 1), self.any_token, device=hidden.device)
        return cast(Tensor, self(ids, give).logits).squeeze(1)
