"""Reading a data source, the built-in generator, files or a hub data set, into examples ready for the tokenizer."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hsplit.config import DataSpec
from hsplit.config.job import BUILT_IN, MixturePart
from hsplit.data.chat import ChatTemplate, Conversation, Rendered, Unusable, rendered
from hsplit.data.examples import Example, meaning_text, parse_meaning
from hsplit.data.forms import FORMS, Form, Pair, Record, Segments, detected, record_of
from hsplit.data.restaurants import NO_LABEL, descriptions
from hsplit.data.rows import Row, is_hub_id, read_rows
from hsplit.data.text_files import listed
from hsplit.errors import InputError
from hsplit.waiting import track

_SEPARATORS = {"meaning": " =>", "plain": "\n", "text": ""}
_DEFAULT_FILE_SLOT = "name"
_DEFAULT_BUILT_IN_SLOT = "food"
_NAMED = 3
"""Places that are named for each reason to skip rows."""


@dataclass(frozen=True)
class Skipped:
    """Rows that were left out for one reason.

    Attributes:
        count: how many.
        first: where the first of them stand.
    """

    count: int
    first: tuple[str, ...]

    @property
    def places(self) -> str:
        """The first of them, with the file's name once for those of one file, and a sign where there are more."""
        file, named = "", list[str]()
        for place in self.first:
            named.append(place.removeprefix(f"{file}: "))
            file = place.rpartition(": ")[0]
        return ", ".join([*named, *(["…"] if self.count > len(named) else [])])


@dataclass(frozen=True)
class Reading:
    """A source as it was read.

    Attributes:
        examples: of the rows that can be learned from, in their order.
        form: name of their form in ``data.form``, or the built-in source's.
        title: the form in words.
        skipped: the others, by reason.
        unused: columns that nothing was taken from.
    """

    examples: list[Example]
    form: str
    title: str
    skipped: Mapping[str, Skipped] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    @property
    def left_out(self) -> int:
        """Number of rows that were skipped."""
        return sum(own.count for own in self.skipped.values())

    @property
    def headline(self) -> str:
        """Form and numbers of examples and skipped rows."""
        rows = "1 row" if self.left_out == 1 else f"{self.left_out:,} rows"
        return f"read as {self.title}: {len(self.examples):,} examples" + (f", {rows} skipped" if self.skipped else "")

    def __str__(self) -> str:
        """How the source was read, in a line: the headline, and what was skipped."""
        reasons = "; ".join(f"{own.count:,} {reason}: {own.places}" for reason, own in self.skipped.items())
        return self.headline + (f" ({reasons})" if reasons else "")


def read_source(source: str, data: DataSpec | None = None, seed: int = 0, chat: ChatTemplate | None = None) -> Reading:
    """Read the examples of a source, in its order.

    Args:
        source: ``restaurants``, or a file, a folder, a pattern or a hub id, as :func:`~hsplit.data.rows.read_rows`.
        data: how to read it (``job.data``), by default as its defaults say; its own source is not looked at.
        seed: of the generator, and of the draw for ``data.limit``.
        chat: the model's chat template; only conversations need one.

    Raises:
        InputError: naming the file, the row or line, and what would be right; rows that cannot be learned from are
            left out, unless ``data.strict``, or nothing is left.
    """
    data = data or DataSpec()
    unused: tuple[str, ...] = ()
    if source == BUILT_IN:
        made = descriptions(data.examples, seed)
        rows = [Row(BUILT_IN, {}) for _ in made]
        records: list[Record] = [Pair(meaning_text(one.slots), one.text, "meaning") for one in made]
        form, title, skips = BUILT_IN, "descriptions of restaurants", _Skips(True)
    else:
        rows, empty = read_rows(source)
        skips = _Skips(data.strict)
        for where in empty:
            skips.add(Unusable("empty", f"{where} is empty; delete it or fill it in"))
        rows, form = _named(rows, data, source)
        own = FORMS[form]
        title, unused = own.title, _unused(rows, own, data.label)
        rows, records = _records(rows, own, skips)
    labels = _labels(rows, records, source, data.label)
    if data.limit is not None and data.limit < len(rows):
        chosen = sorted(random.Random(seed).sample(range(len(rows)), data.limit))
        rows, records = [rows[i] for i in chosen], [records[i] for i in chosen]
        labels = [labels[i] for i in chosen]
    examples = []
    for row, record, label in zip(track(rows, "rendering the rows"), records, labels, strict=True):
        try:
            examples.append(_example(row, record, label, data, form, chat))
        except Unusable as fault:
            skips.add(fault, row.where)
    if not examples:
        raise skips.nothing_left(source)
    return Reading(examples, form, title, skips.by_reason, unused)


def read_data(data: DataSpec, seed: int = 0, chat: ChatTemplate | None = None) -> Reading:
    """Read a job's shared data: its source, or its mixture of several.

    Args:
        data: where they are, and how to read them.
        seed, chat: as for :func:`read_source`.

    Raises:
        InputError: as for :func:`read_source`.
    """
    if not data.mixture:
        return read_source(data.source, data, seed, chat)
    readings = [_part(part, data, seed, chat) for part in data.mixture]
    examples = [one for chosen in _mixed(readings, data.mixture, seed) for one in chosen]
    if data.limit is not None and data.limit < len(examples):
        chosen = random.Random(seed).sample(range(len(examples)), data.limit)
        examples = [examples[i] for i in sorted(chosen)]
    named = [f"{_name(part.source)} as {one.title}" for part, one in zip(data.mixture, readings, strict=True)]
    title = f"a mixture ({', '.join(named)})"
    unused = tuple(dict.fromkeys(key for one in readings for key in one.unused))
    return Reading(examples, "mixture", title, _joined(one.skipped for one in readings), unused)


def _part(part: MixturePart, data: DataSpec, seed: int, chat: ChatTemplate | None) -> Reading:
    own = {"form": part.form, "columns": part.columns, "label": part.label or data.label, "limit": None}
    reading = read_source(part.source, data.model_copy(update=own), seed, chat)
    if own["label"] is not None:
        return reading
    labelled = [replace(example, label=_name(part.source)) for example in reading.examples]
    return replace(reading, examples=labelled)


def _mixed(readings: Sequence[Reading], parts: Sequence[MixturePart], seed: int) -> list[list[Example]]:
    """Draw from each part as many as its weight says, so that the scarcest is used whole."""
    weights = [part.weight or 0.0 for part in parts]
    if not any(weights):
        return [reading.examples for reading in readings]
    scale = min(len(reading.examples) / weight for reading, weight in zip(readings, weights, strict=True))
    mixed = []
    for reading, weight in zip(readings, weights, strict=True):
        count = min(len(reading.examples), max(1, round(scale * weight)))
        chosen = random.Random(seed).sample(range(len(reading.examples)), count)
        mixed.append([reading.examples[i] for i in sorted(chosen)])
    return mixed


def _joined(skipped: Iterable[Mapping[str, Skipped]]) -> dict[str, Skipped]:
    every: dict[str, Skipped] = {}
    for reason, own in (item for one in skipped for item in one.items()):
        known = every.get(reason)
        every[reason] = (
            own if known is None else replace(known, count=known.count + own.count,
                                              first=(*known.first, *own.first)[:_NAMED])
        )  # fmt: skip
    return dict(sorted(every.items(), key=lambda item: -item[1].count))


def _name(source: str) -> str:
    """The name of a source in messages and as a label: of a path its last part."""
    return source if is_hub_id(source) else Path(source).name


class _Skips:
    """Rows that are left out, by reason, or refused where reading is strict."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._counts: Counter[str] = Counter()
        self._first: dict[str, list[Unusable]] = {}
        self._where: dict[str, list[str]] = {}

    def add(self, fault: Unusable, where: str | None = None) -> None:
        """Count a row, or raise its fault."""
        if self._strict:
            raise fault
        self._counts[fault.reason] += 1
        first = self._first.setdefault(fault.reason, [])
        if len(first) < _NAMED:
            first.append(fault)
            place = where or fault.discreet.partition(" is ")[0]
            self._where.setdefault(fault.reason, []).append(place)

    @property
    def by_reason(self) -> dict[str, Skipped]:
        return {reason: Skipped(count, tuple(self._where[reason])) for reason, count in self._counts.most_common()}

    def nothing_left(self, source: str) -> InputError:
        """Make the error for a source without a row to learn from: its first fault."""
        if not self._counts:
            return InputError(f"{source}: has no rows; at least one example is needed")
        reason = self._counts.most_common(1)[0][0]
        fault, total = self._first[reason][0], sum(self._counts.values())
        if total == 1:
            return InputError(str(fault), fault.discreet)
        all_ = f"none of {total:,} rows can be learned from; the first"
        return InputError(f"{fault} ({all_})", f"{fault.discreet} ({all_})")


def _named(rows: list[Row], data: DataSpec, source: str) -> tuple[list[Row], str]:
    """Rename columns as ``data.columns`` says, and find the form."""
    if data.columns:
        names = {column: name for name, column in data.columns.items()}
        if missing := [column for column in names if not any(column in row.fields for row in rows)]:
            there = listed([*rows[0].fields])
            wrong = f"{source}: data.columns: no row has {listed(missing)}"
            raise InputError(f"{wrong}; there are {there}", wrong)
        hidden = set(data.columns) - set(names)
        rows = [
            Row(row.where, {names.get(key, key): value for key, value in row.fields.items() if key not in hidden})
            for row in rows
        ]
    if data.form is not None:
        return rows, data.form
    # The columns that are named decide where they are a form; else with what the row has beside them.
    if any(form.fits(data.columns) for form in FORMS.values()):
        return rows, detected([Row(rows[0].where, {key: None for key in data.columns})], source)
    return rows, detected(rows, source)


def _unused(rows: Sequence[Row], form: Form, label: str | None) -> tuple[str, ...]:
    used = frozenset().union(*form.keys) | form.uses | {label}
    return tuple(key for key in rows[0].fields if key not in used)


def _records(rows: Sequence[Row], form: Form, skips: _Skips) -> tuple[list[Row], list[Record]]:
    kept, records = list[Row](), list[Record]()
    for row in rows:
        try:
            record = record_of(row, form)
        except Unusable as fault:
            skips.add(fault, row.where)
            continue
        kept.append(row)
        records.append(record)
    return kept, records


def _example(
    row: Row, record: Record, label: str | None, data: DataSpec, form: str, chat: ChatTemplate | None
) -> Example:
    if isinstance(record, Conversation):
        if form == "alpaca" and chat is None:
            record = _plain(record)
        else:
            made = rendered(record, chat, data.train_on, row.where, data.end_of_turn)
            return Example(made.prompt, made.response, label, made.turns, made.unsupervised)
    if isinstance(record, Segments):
        made = _of_segments(record)
        return Example(made.prompt, made.response, label, None, made.unsupervised)
    separator = _SEPARATORS[record.style] if data.separator is None or record.style == "text" else data.separator
    if record.style == "meaning":
        return _answered(record.prompt.strip() + separator, f" {record.response.strip()}", label, data)
    if record.style == "plain":
        return _answered(record.prompt + separator, record.response, label, data)
    return Example("", record.response, label, text=True)


def _answered(prompt: str, response: str, label: str | None, data: DataSpec) -> Example:
    end = len(response)
    return Example(prompt, response, label, unsupervised=() if data.end_of_turn else ((end, end),))


def _plain(conversation: Conversation) -> Pair:
    """An instruction and its answer without a chat template."""
    *before, last = (str(turn["content"]) for turn in conversation.turns)
    return Pair("\n".join(before), last, "plain")


def _of_segments(segments: Segments) -> Rendered:
    parts = list(segments.parts)
    learned = [i for i, (text, flag) in enumerate(parts) if flag and text]
    prompt = "".join(text for text, _ in parts[: learned[0]])
    response, unsupervised = "", list[tuple[int, int]]()
    for text, flag in parts[learned[0] : learned[-1] + 1]:
        if text and not flag:
            unsupervised.append((len(response), len(response) + len(text)))
        response += text
    return Rendered(prompt, response, tuple(unsupervised), "")


def _labels(rows: Sequence[Row], records: Sequence[Record], source: str, label: str | None) -> list[str | None]:
    """Find the label of each row: its field of that name, else the slot of that name in its meaning representation.

    A slot that a row lacks is a class of its own; a field that a row lacks or leaves blank is no label. If no row has
    the default slot, there are no labels, which matters only to a partition by label.
    """
    name = label or (_DEFAULT_BUILT_IN_SLOT if source == BUILT_IN else _DEFAULT_FILE_SLOT)
    if label is not None and any(label in row.fields for row in rows):
        return [_field_label(row, label) for row in rows]
    meanings = [parse_meaning(record.prompt) if isinstance(record, Pair) else None for record in records]
    if any(slots and name in slots for slots in meanings):
        return [None if slots is None else slots.get(name, NO_LABEL) for slots in meanings]
    if label is None or not rows:
        return [None] * len(rows)
    there = listed([*rows[0].fields, *(meanings[0] or ())])
    wrong = f"data.label: {label!r} is no column, key or slot of {source}"
    raise InputError(f"{wrong}; its first example has {there}", wrong)


def _field_label(row: Row, label: str) -> str | None:
    value = row.fields.get(label)
    if isinstance(value, (dict, list)):
        raise InputError(f"{row.where}: {label}, the data.label, is a {type(value).__name__}; must be a single value")
    return None if value is None else str(value).strip() or None
