"""The depth-joined batch: every client's tokens through the deep layers at once (METHOD 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hsplit.actors.messages import Activations, WireTensor
from hsplit.lora.importance_probe import ImportanceProbe
from hsplit.models.packing import Packing
from hsplit.models.segment import Segment
from hsplit.models.tail import TailLosses


@dataclass
class JoinedBatch:
    """All clients' tokens after the last layer. Results are in the order of ``messages``.

    Attributes:
        output: ``(n, d)``.
        messages: the clients' messages, in the order given.
        inputs: each client's hidden states at its split point, leaves of the graph.
        tokens: each client's tokens of ``output``.
        probe: scores weights in the backward, where a client asks for it.
    """

    output: Tensor
    messages: tuple[Activations, ...]
    inputs: dict[str, Tensor]
    tokens: dict[str, slice]
    probe: ImportanceProbe | None = None

    @staticmethod
    def run(
        segment: Segment, layers: int, messages: Sequence[Activations], inputs: Mapping[str, Tensor]
    ) -> JoinedBatch:
        """Run the deep layers from the shallowest split on; a client's tokens join at its own split.

        Args:
            segment: holds the layers from the shallowest split on.
            layers: of the whole model.
            messages: one for each client.
            inputs: by client its hidden states, unpacked, ``(n_c, d)``.
        """
        by_depth = sorted(messages, key=lambda m: m.split)
        tokens: dict[str, slice] = {}
        lengths: tuple[int, ...] = ()
        hidden: Tensor | None = None
        depth = by_depth[0].split
        for message in by_depth:
            joining = inputs[message.client]
            if hidden is not None and message.split > depth:
                hidden = segment.run(hidden, Packing.of(lengths, joining.device), depth, message.split)
                depth = message.split
            start = 0 if hidden is None else hidden.shape[0]
            tokens[message.client] = slice(start, start + joining.shape[0])
            lengths += message.lengths
            hidden = joining if hidden is None else torch.cat([hidden, joining])
        assert hidden is not None
        output = segment.run(hidden, Packing.of(lengths, hidden.device), depth, layers)
        return JoinedBatch(output, tuple(messages), dict(inputs), tokens)

    def losses(self, tail: TailLosses, rows_only: bool = True) -> tuple[Tensor, Tensor]:
        """Compute cross-entropy sum and number of supervised tokens of each client, ``(clients,)`` each.

        Args:
            tail: final norm and head.
            rows_only: see :meth:`TailLosses.supervised_losses`.
        """
        count, n, device = len(self.messages), self.output.shape[0], self.output.device
        targets = torch.empty(n, dtype=torch.int64, device=device)
        owner = torch.empty(n, dtype=torch.int64, device=device)
        for index, message in enumerate(self.messages):
            assert message.targets is not None
            targets[self.tokens[message.client]] = torch.tensor(message.targets, dtype=torch.int64, device=device)
            owner[self.tokens[message.client]] = index
        # One selection from the joined batch: a copy for each client would double the hidden states.
        losses, owner = tail.supervised_losses(self.output, targets, rows_only), owner[targets != -100]
        sums = torch.zeros(count, dtype=losses.dtype, device=device).index_add(0, owner, losses)
        return sums, torch.bincount(owner, minlength=count)

    @property
    def weights(self) -> Tensor:
        """Weights of the clients' losses, ``(clients,)``, fp64."""
        return torch.tensor([message.weight for message in self.messages], dtype=torch.float64)

    def outputs(self, transport: str) -> dict[str, WireTensor]:
        """Pack the last layer's output for each client's tokens ``(n_c, d)``, by client."""
        return {m.client: m.hidden.answer(self.output[self.tokens[m.client]], "deep", transport) for m in self.messages}

    def gradients(self, transport: str) -> dict[str, WireTensor | None]:
        """Pack for client ``i`` the gradient of its own mean loss: that of the token sum, divided by its ``n_i``.

        ``None`` for a client that has nothing to train.
        """
        returned: dict[str, WireTensor | None] = {}
        for message in self.messages:
            gradient = self.inputs[message.client].grad
            if gradient is None or message.split == 0:
                returned[message.client] = None
            else:
                mean = gradient / (max(message.step_supervised, 1) * message.weight)
                returned[message.client] = message.hidden.answer(mean, "down", transport)
        return returned
