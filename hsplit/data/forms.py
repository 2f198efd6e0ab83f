"""The forms that rows of data have: detected by their keys, or named by ``data.form``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hsplit.config.reading import json_value
from hsplit.config.section import shown
from hsplit.data.chat import Conversation, Unusable
from hsplit.data.rows import LINE, Row
from hsplit.data.text_files import is_unicode, listed
from hsplit.errors import InputError

Style = Literal["meaning", "plain", "text"]


@dataclass(frozen=True)
class Pair:
    """A prompt and its response, or a text to learn whole, which has no prompt.

    Attributes:
        prompt, response: as in the file.
        style: ``meaning`` (a meaning representation or a text line: joined by `` =>``), ``plain`` (joined by a line
            end), or ``text``.
    """

    prompt: str
    response: str
    style: Style


@dataclass(frozen=True)
class Segments:
    """Texts one after another, each with whether it is learned."""

    parts: tuple[tuple[str, bool], ...]


Record = Pair | Segments | Conversation


@dataclass(frozen=True)
class Form:
    """One form.

    Attributes:
        title: its name in messages.
        keys: sets of keys, of which a row has one whole.
        read: makes the record of a row that has these keys.
        uses: further keys that it reads.
    """

    title: str
    keys: tuple[frozenset[str], ...]
    read: Callable[[Row], Record]
    uses: frozenset[str] = frozenset()

    def fits(self, keys: Collection[str]) -> bool:
        """True if a row with ``keys`` may be of this form."""
        return any(own <= set(keys) for own in self.keys)

    @property
    def needs(self) -> str:
        """Its keys, for messages."""
        return " or ".join(" and ".join(sorted(own, key=_ORDER.index)) for own in self.keys)


# Names in the order in which messages list them.
_ORDER = [
    *("mr", "ref", "prompt", "question", "context", "instruction", "response", "completion", "answer", "output"),
    *("messages", "conversations", "conversation", "segments", "text", LINE),
]


# -- texts ------------------------------------------------------------------------------------------------------------


def text_at(row: Row, key: str, name: str | None = None) -> str:
    """Return the text at ``key``, not blank; ``name`` is the key's in messages.

    Raises:
        Unusable: it is no text, or blank.
    """
    value, name = row.fields.get(key), name or key
    if value is not None and not isinstance(value, str):
        wrong = f"{row.where}: {name} is {shown(value, 40)}; must be a text"
        raise Unusable("no text", wrong, f"{row.where}: {name} must be a text")
    if value is None or not value.strip():
        raise Unusable(f"blank {name.removeprefix('the ')}", f"{row.where}: {name} is blank; must be a text")
    return unicode(value, f"{row.where}: {name}")


def unicode(text: str, where: str) -> str:
    """Return ``text``.

    Raises:
        Unusable: it cannot be encoded.
    """
    if not is_unicode(text):
        raise Unusable(
            "no valid Unicode", f"{where} holds half of a surrogate pair (\\ud800 to \\udfff); must be valid Unicode"
        )
    return text


def _pair(prompt: str, response: str, style: Style) -> Callable[[Row], Pair]:
    return lambda row: Pair(text_at(row, prompt), text_at(row, response), style)


def _line(row: Row) -> Pair:
    sides = str(row.fields[LINE]).split("||")
    if len(sides) != 2:
        wrong = f"{row.where} has {len(sides) - 1} separators ||; needs exactly one, as in prompt||response"
        raise Unusable("no single ||", wrong)
    both = Row(row.where, {"the prompt": sides[0], "the response": sides[1]})
    return Pair(text_at(both, "the prompt"), text_at(both, "the response"), "meaning")


def _text(row: Row) -> Pair:
    return Pair("", text_at(row, LINE if LINE in row.fields else "text", "text"), "text")


def _segments(row: Row) -> Segments:
    parts = row.fields["segments"]
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        raise Unusable("no segments", f'{row.where}: segments must be a list of {{"label": bool, "text": text}}')
    found = []
    for number, part in enumerate(parts, start=1):
        where, text = f"{row.where}: segments: part {number}", part.get("text")
        if not isinstance(text, str):
            raise Unusable("no text", f'{where} must be {{"label": true or false, "text": text}}')
        found.append((unicode(text, where), bool(flag_of(part, where))))
    if not any(learned and text.strip() for text, learned in found):
        raise Unusable("no turn to train on", f"{row.where}: segments: none is to be learned")
    return Segments(tuple(found))


# -- conversations ----------------------------------------------------------------------------------------------------

_FLAGS: Mapping[str, bool] = {
    **dict.fromkeys(("weight", "loss_weight", "train", "training", "loss", "label", "trainable"), True),
    **dict.fromkeys(("masked", "mask"), False),
}
"""Keys by which data sets mark what is learned, and the value that says so."""
_BESIDE = ("tools", "functions", "documents", "chat_template_kwargs")
"""Inputs of templates beside the turns."""
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "usr"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "bing", "bard", "ai"), "assistant"),
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("tool", "observation", "function_response", "function", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
"""Names of roles in the wild; ``call`` is a turn of the assistant's that calls a tool."""
_TEXT_PARTS = ("text", "output_text", "input_text")


def flag_of(turn: Mapping[str, Any], where: str) -> bool | None:
    """Find whether a turn says that it is learned; ``None``: it says nothing.

    Raises:
        Unusable: a weight between 0 and 1, or flags that contradict each other.
    """
    said = set[bool]()
    for key, learned in _FLAGS.items():
        value = turn.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            wrong = f"{where}: {key} must be 0 or 1"
            raise Unusable("partial weight", f"{wrong} (got {shown(value, 40)})", wrong)
        said.add(bool(value) is learned)
    if len(said) > 1:
        raise Unusable("contradicting flags", f"{where}: its flags contradict each other")
    return said.pop() if said else None


def _messages(row: Row) -> Conversation:
    return _conversation(row, "messages")


def _sharegpt(row: Row) -> Conversation:
    return _conversation(row, "conversations" if "conversations" in row.fields else "conversation")


def _conversation(row: Row, key: str) -> Conversation:
    turns, flags = list[dict[str, Any]](), list[bool | None]()
    given = row.fields[key]
    if isinstance(given, str):
        given = _parsed(given)
    if not isinstance(given, list) or not given:
        raise Unusable("no turns", f"{row.where}: {key} must be a list of turns")
    system = row.fields.get("system")
    if isinstance(system, str) and system.strip():
        turns.append({"role": "system", "content": unicode(system, f"{row.where}: system")})
        flags.append(None)
    for number, turn in enumerate(given, start=1):
        where = f"{row.where}: {key}: turn {number}"
        if not isinstance(turn, Mapping):
            raise Unusable("no turns", f'{where} must be {{"role": text, "content": text}}')
        turns.append(_turn(turn, where))
        flags.append(flag_of(turn, where))
    return Conversation(tuple(turns), tuple(flags), _beside(row))


def _turn(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    named = turn.get("role", turn.get("from"))
    role = _ROLES.get(named.lower()) if isinstance(named, str) else None
    if role is None:
        known = "its role" if "role" in turn or "from" in turn else '{"role": text, "content": text}'
        raise Unusable("unknown role", f"{where}: {known} must be one of {listed(sorted(_ROLES))}")
    made, content = dict[str, Any](role=role), turn.get("content", turn.get("value"))
    calls = turn.get("tool_calls")
    if role == "call":
        made["role"], calls, content = "assistant", _calls_of(content, where), None
    if isinstance(content, list):
        texts, reasoning, called = _parts(content, where)
        content = "".join(texts)
        calls = [*(calls or []), *called] or None
        if reasoning:
            made["reasoning_content"] = "".join(reasoning)
    if content is not None and not isinstance(content, str):
        raise Unusable("no text", f"{where}: content must be a text")
    if content is None and not calls:
        raise Unusable("no text", f'{where} must be {{"role": text, "content": text}}')
    made["content"] = unicode(content or "", where)
    if calls:
        made["tool_calls"] = [_call(call, where) for call in calls]
    made |= {key: turn[key] for key in ("name", "tool_call_id", "reasoning_content") if turn.get(key) is not None}
    return made


def _parts(parts: Sequence[Any], where: str) -> tuple[list[str], list[str], list[Any]]:
    """Texts, reasoning and calls of a content that is a list of parts."""
    texts, reasoning, calls = list[str](), list[str](), list[Any]()
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        value = part.get("text", part.get("value")) if isinstance(part, Mapping) else part
        if kind == "tool_call":
            calls += _calls_of(value, where)
        elif isinstance(value, str) and (kind in (None, *_TEXT_PARTS) or kind == "reasoning"):
            (reasoning if kind == "reasoning" else texts).append(unicode(value, where))
        else:
            wrong = f"{where}: a part of its content is"
            raise Unusable("parts that are no text", f"{wrong} {shown(kind, 40)}, not text", f"{wrong} no text")
    return texts, reasoning, calls


def _calls_of(value: Any, where: str) -> list[Any]:
    """The calls that a text or an object describes."""
    parsed = _parsed(value) if isinstance(value, str) else value
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls or not all(isinstance(call, Mapping) for call in calls):
        raise Unusable("unreadable tool call", f"{where}: a call of a tool must be an object with name and arguments")
    return calls


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call as templates take it: arguments as an object, not as its text."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Unusable("unreadable tool call", f"{where}: a call of a tool must have a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        parsed = _parsed(arguments)
        arguments = parsed if isinstance(parsed, Mapping) else arguments
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return made | ({"id": call["id"]} if call.get("id") else {})


def _beside(row: Row) -> dict[str, Any]:
    """Tools and other inputs of the template that the row has."""
    found = dict[str, Any]()
    for key in _BESIDE:
        value = row.fields.get(key)
        value = _parsed(value) if isinstance(value, str) else value
        if not value:
            continue
        if key == "chat_template_kwargs":
            if not isinstance(value, Mapping):
                raise Unusable("unreadable tools", f"{row.where}: {key} must be an object")
            found |= value
        elif not isinstance(value, list):
            raise Unusable("unreadable tools", f"{row.where}: {key} must be a list of objects")
        else:
            found["tools" if key == "functions" else key] = value
    return found


def _parsed(text: str) -> Any:
    """The value of a JSON text; ``None`` where it is none."""
    try:
        return json_value(text) if text.strip() else None
    except ValueError:
        return None


def _alpaca(row: Row) -> Conversation:
    turns = list[dict[str, Any]]()
    system, history = row.fields.get("system"), row.fields.get("history") or []
    if isinstance(system, str) and system.strip():
        turns.append({"role": "system", "content": unicode(system, f"{row.where}: system")})
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    ):
        raise Unusable("unreadable history", f"{row.where}: history must be a list of [instruction, answer]")
    for asked, answered in history:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    further = row.fields.get("input")
    asked = text_at(row, "instruction")
    if further is not None and not (isinstance(further, str) and not further.strip()):
        asked = f"{asked}\n{text_at(row, 'input')}"
    turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": text_at(row, "output")}]
    return Conversation(tuple(turns), (None,) * len(turns))


def _keys(*names: Sequence[str]) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(own) for own in names)


FORMS: dict[str, Form] = {
    "e2e": Form("E2E", _keys(("mr", "ref")), _pair("mr", "ref", "meaning")),
    "prompt-response": Form("prompt and response", _keys(("prompt", "response")), _pair("prompt", "response", "plain")),
    "prompt-completion": Form(
        "prompt and completion", _keys(("prompt", "completion")), _pair("prompt", "completion", "plain")
    ),
    "context-completion": Form(
        "context and completion", _keys(("context", "completion")), _pair("context", "completion", "plain")
    ),
    "question-answer": Form("question and answer", _keys(("question", "answer")), _pair("question", "answer", "plain")),
    "alpaca": Form("Alpaca", _keys(("instruction", "output")), _alpaca, frozenset({"input", "system", "history"})),
    "messages": Form("OpenAI messages", _keys(("messages",)), _messages, frozenset({"system", *_BESIDE})),
    "sharegpt": Form(
        "ShareGPT", _keys(("conversations",), ("conversation",)), _sharegpt, frozenset({"system", *_BESIDE})
    ),
    "segments": Form("segments", _keys(("segments",)), _segments),
    "pairs": Form("prompt||response lines", _keys((LINE,)), _line),
    "text": Form("plain text", _keys(("text",), (LINE,)), _text),
}
"""Forms by their name in ``data.form``."""


def detected(rows: Sequence[Row], source: str) -> str:
    """Find the form of ``rows`` by their keys, name in :data:`FORMS`.

    Lines of text are pairs if the first line has ``||``.

    Raises:
        InputError: the first row's keys are those of no form, or of several.
    """
    first = rows[0]
    if LINE in first.fields:
        return "pairs" if "||" in str(first.fields[LINE]) else "text"
    fitting = [name for name, form in FORMS.items() if form.fits(first.fields)]
    if not fitting:
        known = ", or ".join(dict.fromkeys(form.needs for name, form in FORMS.items() if name != "pairs"))
        needs = f"needs {known}; or name them by data.columns"
        # In a file without a header the keys are its first example.
        raise InputError(f"{source}: has {listed([*first.fields])}; {needs}", f"{source}: has other columns; {needs}")
    if len(fitting) > 1:
        readings = " or ".join(f"{FORMS[name].title} (data.form: {name})" for name in fitting)
        raise InputError(f"{source}: may be read as {readings}; say which")
    return fitting[0]


def record_of(row: Row, form: Form) -> Record:
    """Read a row of ``form``.

    Raises:
        Unusable: it lacks keys of the form, or what they hold cannot be learned from.
    """
    if not form.fits(row.fields):
        wrong = f"{row.where} has {listed([*row.fields])}; needs {form.needs}"
        raise Unusable("other keys", wrong, f"{row.where} has other keys; needs {form.needs}")
    try:
        return form.read(row)
    except RecursionError:
        raise Unusable("nested too deeply", f"{row.where} is nested too deeply") from None
