"""Attacks of an honest but curious server on the clients' messages, for `privacy.py`.

The server knows the base model, the split point, the size of the noise and public texts of the same kind. Every attack
ends in a vector a position that is compared with the embeddings of the whole vocabulary by cosine.

- **nearest**: the activation against that of each token alone at that depth (at depth 0 its embedding).
- **linear**: ridge regression from the activation to the token's embedding, fitted on public texts.
- **inverter**: that regression with one bidirectional transformer layer beside it, trained on public texts: it sees the
  neighbours, and learns likely sequences.
- **labels**: the gradient that a client's tail returns (U-shape) against the one that each label would give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from hsplit.actors.client import ActivationNoise
from hsplit.actors.messages import WireTensor
from hsplit.data import TokenizedExample
from hsplit.models.packing import Packing
from hsplit.models.segment import Segment
from hsplit.models.tail import Tail

# Sequences that run through the front at once, positions that are matched at once, tokens that share a first one.
BATCH, MATCHED_AT_ONCE, ALONE_AT_ONCE = 32, 256, 1024
# Sequences in a step of the inverter's training, of which a quarter are made.
TRAINED_AT_ONCE = 16
RIDGE = 1e-3


@dataclass(frozen=True)
class Observed:
    """Activations, with the tokens that the server wants to recover.

    Attributes:
        hidden: ``(n, d)``, activations, in fp32 where they have arrived.
        ids: ``(n,)`` int64, the tokens that they stand for.
        lengths: tokens of each sequence.
    """

    hidden: Tensor
    ids: Tensor
    lengths: tuple[int, ...]

    @property
    def typical_norm(self) -> float:
        """Median L2 norm of a token's activations."""
        return float(self.hidden.float().norm(dim=1).median())

    def sequences(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.hidden.split(self.lengths), self.ids.split(self.lengths), strict=True))


@torch.no_grad()
def activations(front: Segment, examples: Sequence[TokenizedExample]) -> Observed:
    """Run ``examples`` through a client's front."""
    hidden, ids = [], []
    lengths: list[int] = []
    for start in range(0, len(examples), BATCH):
        part = [example.ids for example in examples[start : start + BATCH]]
        own = tuple(len(one) for one in part)
        flat = torch.tensor([token for one in part for token in one])
        packing = Packing.of(own)
        hidden.append(front.run(front.embed(flat, packing), packing, 0, front.spec.last))
        ids.append(flat)
        lengths += own
    return Observed(torch.cat(hidden), torch.cat(ids), tuple(lengths))


def received(sent: Observed, noise: ActivationNoise, wire: str) -> Observed:
    """Return activations as received: noised, packed for the wire and unpacked."""
    arrived = WireTensor.pack(noise.added_to(sent.hidden), wire).unpack(torch.float32, "cpu")
    return Observed(arrived, sent.ids, sent.lengths)


def scrambled(examples: Sequence[TokenizedExample], vocabulary: int, seed: int) -> list[TokenizedExample]:
    """Return public texts with every other token replaced by any of the vocabulary; they need only the model."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for example in examples:
        ids = torch.tensor(example.ids)
        drawn = torch.randint(vocabulary, ids.shape, generator=generator)
        taken = torch.rand(ids.shape, generator=generator) < 0.5
        made.append(TokenizedExample(tuple(torch.where(taken, drawn, ids).tolist()), example.prompt_length))
    return made


@torch.no_grad()
def alone(front: Segment, first: int, vocabulary: int) -> Tensor:
    """Return each token's activation at the split, alone behind ``first``, ``(V, d)``; at depth 0 the embedding."""
    rows = []
    for start in range(0, vocabulary, ALONE_AT_ONCE):
        tokens = torch.arange(start, min(start + ALONE_AT_ONCE, vocabulary))
        flat = torch.stack([torch.full_like(tokens, first), tokens], dim=1).flatten()
        packing = Packing.of((2,) * len(tokens))
        rows.append(front.run(front.embed(flat, packing), packing, 0, front.spec.last)[1::2].float())
    return torch.cat(rows)


def guesses(vectors: Tensor, table: Tensor, count: int) -> Tensor:
    """The ``count`` rows of ``table`` ``(V, d)`` of largest cosine with each of ``vectors``: ``(n, count)``."""
    table = normalize(table)
    parts = normalize(vectors).split(MATCHED_AT_ONCE)
    return torch.cat([(part @ table.T).topk(count, dim=1).indices for part in parts])


class Linear:
    """Ridge regression from activations to embeddings.

    Args:
        public: the server's activations of public texts.
        embeddings: ``(V, d)``.
    """

    def __init__(self, public: Observed, embeddings: Tensor) -> None:
        x, y = _with_bias(public.hidden), normalize(embeddings)[public.ids]
        gram = x.T @ x
        gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()))
        self.weight = torch.linalg.solve(gram, x.T @ y)

    def vectors(self, seen: Observed) -> Tensor:
        return _with_bias(seen.hidden) @ self.weight


def _with_bias(hidden: Tensor) -> Tensor:
    # A few tokens have norms a hundred times the others': only directions are comparable.
    unit = normalize(hidden) * hidden.shape[1] ** 0.5
    return torch.cat([unit, torch.ones(len(unit), 1)], dim=1)


class Inverter(nn.Module):
    """The regression, and beside it a transformer layer over the whole sequence, which begins with no say.

    Args:
        linear: where it begins.
        width: of the activations.
        vocabulary: how many tokens there are, each of which gets a bias: how likely it is.
        heads: of the layer's attention.
    """

    def __init__(self, linear: Linear, width: int, vocabulary: int, heads: int) -> None:
        super().__init__()
        self.linear = nn.Parameter(linear.weight.clone())
        self.layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.scale = nn.Parameter(torch.tensor(20.0))
        self.prior = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        """Packed activations ``(n, d)`` to vectors in the space of embeddings ``(n, d)``."""
        unit = _with_bias(hidden)
        padded = nn.utils.rnn.pad_sequence(list(unit[:, :-1].split(list(lengths))), batch_first=True)
        padding = torch.arange(padded.shape[1])[None, :] >= torch.tensor(lengths)[:, None]
        seen = self.layer(padded, src_key_padding_mask=padding)[~padding]
        return unit @ self.linear + self.out(seen)

    @torch.no_grad()
    def guesses(self, seen: Observed, embeddings: Tensor, count: int) -> Tensor:
        self.eval()
        table, found = normalize(embeddings), []
        sequences = seen.sequences()
        for start in range(0, len(sequences), BATCH):
            hidden = [one for one, _ in sequences[start : start + BATCH]]
            vectors = normalize(self(torch.cat(hidden), [len(one) for one in hidden]))
            for part in vectors.split(MATCHED_AT_ONCE):
                found.append((self.scale * part @ table.T + self.prior).topk(count, dim=1).indices)
        return torch.cat(found)


def trained_inverter(
    linear: Linear, public: Observed, made: Observed, embeddings: Tensor, steps: int, seed: int
) -> Inverter:
    """Train an inverter on public texts, and on ``made`` ones that have tokens which the public texts lack.

    Softmax over the tokens of all public texts and as many drawn ones.

    Args:
        linear: where it begins.
        public, made: observed at the noise that clients send.
        embeddings: ``(V, d)``.
        steps: of AdamW, each over :data:`TRAINED_AT_ONCE` sequences; in bf16, as the run computes.
        seed: of everything drawn.
    """
    torch.manual_seed(seed)
    vocabulary, width = embeddings.shape
    inverter = Inverter(linear, width, vocabulary, max(1, width // 64))
    optimizer = torch.optim.AdamW(inverter.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    table, known = normalize(embeddings), public.ids.unique()
    real, drawn = public.sequences(), made.sequences()
    quarter = TRAINED_AT_ONCE // 4
    for _ in range(steps):
        picked = [real[int(i)] for i in torch.randint(len(real), (TRAINED_AT_ONCE - quarter,))]
        picked += [drawn[int(i)] for i in torch.randint(len(drawn), (quarter,))]
        hidden, ids = (torch.cat([pair[which] for pair in picked]) for which in (0, 1))
        others = torch.randint(vocabulary, (len(known),))
        candidates, place = torch.cat([known, ids, others]).unique(return_inverse=True)
        targets = place[len(known) : len(known) + len(ids)]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            vectors = normalize(inverter(hidden, [len(one) for one, _ in picked]))
            logits = inverter.scale * (vectors @ table[candidates].T) + inverter.prior[candidates]
        cross_entropy(logits.float(), targets).backward()
        nn.utils.clip_grad_norm_(inverter.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return inverter


def labels_from_gradients(tail: Tail, deep: Tensor, slope: Tensor) -> Tensor:
    """Return the label that each returned gradient reveals: ``(n,)``.

    The gradient at the last layer's output is ``J^T W^T (p - e_label)`` with the norm's Jacobian ``J`` and the head
    ``W``, which is frozen and public; the server computed ``deep`` itself, so it knows all but the label.

    Args:
        tail: final norm and head, in fp32.
        deep: ``(n, d)``, the last layer's output as the server sent it.
        slope: ``(n, d)``, the returned gradient of the sum of losses.
    """
    head = tail.head

    def normed(row: Tensor) -> Tensor:
        output: Tensor = tail.norm(row[None])[0]
        return output

    found = []
    for rows, slopes in zip(deep.float().split(16), slope.float().split(16), strict=True):
        jacobians = torch.stack([_jacobian(normed, row) for row in rows])
        with torch.no_grad():
            expected = (tail.norm(rows) @ head.T).softmax(dim=1) @ head
            # Least squares: directions of the norm's output without influence cannot be solved for.
            gram = jacobians @ jacobians.transpose(1, 2)
            gram.diagonal(dim1=1, dim2=2).add_(1e-6 * gram.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True))
            at_norm = torch.linalg.solve(gram, jacobians @ slopes[..., None])[..., 0]
            difference = expected - at_norm
            found.append((2 * difference @ head.T - head.square().sum(dim=1)).argmax(dim=1))
    return torch.cat(found)


def _jacobian(function: Any, row: Tensor) -> Tensor:
    jacobian: Tensor = torch.autograd.functional.jacobian(function, row, vectorize=True)
    return jacobian
