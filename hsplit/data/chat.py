"""Conversations as prompt and response through the model's own chat template, and which of their turns are learned."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal, Protocol

from hsplit.errors import InputError, error_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["last", "all", "none-but-flagged"]
Span = tuple[int, int]
"""First character, and the one after the last."""

# Attempts to render a conversation and its beginnings within one tick of a clock that the template shows.
_ATTEMPTS = 3
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Unusable(InputError):
    """A row from which nothing can be learned.

    Args:
        reason: the kind of fault, for counting.
        text, discreet: as for any input error.
    """

    def __init__(self, reason: str, text: str, discreet: str | None = None) -> None:
        super().__init__(text, discreet)
        self.reason = reason


class ChatTemplate(Protocol):
    """The model's chat template, as a function of the conversation."""

    def __call__(self, messages: list[dict[str, Any]], add_generation_prompt: bool, **beside: Any) -> str:
        """Render the conversation, on request with the header of the assistant's next answer."""
        ...


class TokenizersTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: one with a template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Texts of the tokenizer's added tokens."""
        return tuple(self._tokenizer.get_added_vocab())

    def __call__(self, messages: list[dict[str, Any]], add_generation_prompt: bool, **beside: Any) -> str:
        """Render the conversation; ``beside``: tools, documents and other inputs of the template."""
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **beside
        )
        return str(text)

    def marked(self, messages: list[dict[str, Any]], **beside: Any) -> tuple[str, list[Span]] | None:
        """Render the conversation, with the spans that the template marks as the assistant's; ``None``: no marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._tokenizer.get_chat_template(None, beside.get("tools"))
        if not _MARKS_ANSWERS.search(template):
            return None
        made: Any = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
            **beside,
        )
        (text,), (spans,) = made
        return text, [(start, stop) for start, stop in spans]


def template_of(tokenizer: Any) -> TokenizersTemplate | None:
    """Return the chat template of ``tokenizer``, or ``None`` if it has none."""
    return TokenizersTemplate(tokenizer) if getattr(tokenizer, "chat_template", None) else None


@dataclass(frozen=True)
class Conversation:
    """The turns of a conversation, as a template takes them.

    Attributes:
        turns: ``role`` and ``content``, and what else a turn has.
        flags: by turn, whether the row says that it is to be learned; ``None`` where it says nothing.
        beside: tools and other inputs of the template.
    """

    turns: tuple[dict[str, Any], ...]
    flags: tuple[bool | None, ...]
    beside: Mapping[str, Any] = field(default_factory=dict)

    def learned(self, train_on: TrainOn) -> list[int]:
        """Numbers of the turns to learn, from 0; only the assistant's."""
        answers = [i for i, turn in enumerate(self.turns) if turn["role"] == "assistant"]
        if train_on == "none-but-flagged":
            return [i for i in answers if self.flags[i]]
        return [i for i in (answers[-1:] if train_on == "last" else answers) if self.flags[i] is not False]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        prompt: up to the first character to learn.
        response: from there to the last one.
        unsupervised: spans of the response that are not learned: other turns, headers of answers, ends of turns.
        turns: :func:`turns_sha256` of the turns before the first that is learned.
    """

    prompt: str
    response: str
    unsupervised: tuple[Span, ...]
    turns: str


def rendered(
    conversation: Conversation, chat: ChatTemplate | None, train_on: TrainOn, where: str, end_of_turn: bool = True
) -> Rendered:
    """Render a conversation up to the last turn that is learned.

    What is learned of a turn is what the template marks as the assistant's, where it marks that; otherwise what it adds
    for the turn to the header of an answer, in generation, its end-of-turn token included. Line ends after that token
    are not, so that the token, where it is the tokenizer's eos, is the last one and is not added twice.

    Args:
        conversation: with at least two turns.
        chat: the model's template, ``None`` if it has none.
        train_on: the ``last`` answer, ``all``, or ``none-but-flagged`` ones.
        where: file and row, for messages.
        end_of_turn: learn the tokens that end an answer, too.

    Raises:
        Unusable: no turn is to be learned; or the template refuses the turns, does not show their tools, or renders
            their beginnings in another way within the whole conversation, so that answers cannot be told apart.
        InputError: there is no template.
    """
    if chat is None:
        raise InputError(
            f"{where}: messages need a model with a chat template; this one has none: use prompt and response"
        )
    learned = conversation.learned(train_on)
    if not learned:
        what = {"last": "its last answer is", "all": "all answers are", "none-but-flagged": "no answer is"}[train_on]
        state = "flagged" if train_on == "none-but-flagged" else "flagged not to be trained on, or there is none"
        raise Unusable("no turn to train on", f"{where}: {what} {state}: there is no turn to train on")
    turns, beside = list(conversation.turns[: learned[-1] + 1]), dict(conversation.beside)
    if blank := next((i for i in learned if not _says_something(turns[i])), None):
        raise Unusable("blank answer", f"{where}: messages: turn {blank + 1}, an answer to learn, is blank")
    try:
        if beside.get("tools") and chat(turns, False, **beside) == chat(turns, False, **beside | {"tools": None}):
            remedy = "give a model whose template does, or rows without"
            raise Unusable("tools not shown", f"{where}: the model's chat template does not show tools; {remedy}")
        whole, spans = _whole_and_spans(turns, learned, chat, beside, where)
    except InputError:
        raise
    except Exception as error:  # a template is a program of the model's author and may raise anything
        refused = f"{where}: the model's chat template refuses these messages"
        raise Unusable("refused by the template", f"{refused}: {error_text(error)}", refused) from None
    begin = spans[0][0]
    response = whole[begin : spans[-1][1]]
    ends = [stop if end_of_turn else start + _said(whole[start:stop], chat) for start, stop in spans]
    starts = [*(start for start, _ in spans[1:]), spans[-1][1]]
    between = [(end - begin, start - begin) for end, start in zip(ends, starts, strict=True)]
    if not response.strip():
        raise Unusable("blank answer", f"{where}: the model's chat template leaves nothing of the answer")
    unsupervised = tuple((start, stop) for start, stop in between if start < stop)
    return Rendered(whole[:begin], response, unsupervised, turns_sha256(turns[: learned[0]]))


def _whole_and_spans(
    turns: list[dict[str, Any]], learned: Sequence[int], chat: ChatTemplate, beside: Mapping[str, Any], where: str
) -> tuple[str, list[Span]]:
    """The text of all turns, and the spans that are learned."""
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if isinstance(chat, TokenizersTemplate) and (marked := chat.marked(turns, **beside)) is not None:
        text, spans = marked
        if len(spans) == len(answers):
            return text, [spans[answers.index(i)] for i in learned]
    for _ in range(_ATTEMPTS):
        whole = chat(turns, False, **beside)
        spans = [span for i in learned if (span := _span_of(i, turns, whole, chat, beside)) is not None]
        if len(spans) == len(learned):
            return whole, spans
    raise Unusable(
        "answers not separable",
        f"{where}: the model's chat template does not put the answer behind the prompt: use prompt and response"
        if len(learned) == 1
        else f"{where}: the model's chat template renders earlier answers in another way: use data.train_on: last",
    )


def _span_of(
    turn: int, turns: list[dict[str, Any]], whole: str, chat: ChatTemplate, beside: Mapping[str, Any]
) -> Span | None:
    """The span of an answer in the text of all turns; ``None`` where beginnings are rendered in another way."""
    prompt = chat(turns[:turn], True, **beside)
    until = whole if turn == len(turns) - 1 else chat(turns[: turn + 1], False, **beside)
    if not whole.startswith(until.rstrip("\n")):
        # A template that ends every conversation with a token of its own has none behind earlier answers.
        until = until[: _common(until, whole, chat)]
    until = until.rstrip("\n")
    if not whole.startswith(prompt):
        # A template that opens a thought where it asks for an answer, and has none of it in answers that are there.
        before = chat(turns[:turn], False, **beside)
        prompt = prompt[: _common_length(prompt, whole)]
        if len(prompt) <= len(before) or not prompt.startswith(before):
            return None
    return (len(prompt), len(until)) if len(prompt) < len(until) else None


def _common_length(one: str, other: str) -> int:
    """Number of characters that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _common(until: str, whole: str, chat: ChatTemplate) -> int:
    """Where two texts part, if ``until`` goes on with a special token there, else 0.

    Special tokens often begin alike, so where they part is where the first one that differs begins.
    """
    at = _common_length(until, whole)
    for token in chat.special_tokens if isinstance(chat, TokenizersTemplate) else ():
        begin = until.rfind(token, 0, at + len(token))
        if 0 <= begin <= at < begin + len(token):
            return begin
    return 0


def _said(answer: str, chat: ChatTemplate) -> int:
    """Number of characters of a rendered answer before the special tokens that end it."""
    tokens = chat.special_tokens if isinstance(chat, TokenizersTemplate) else ()
    while ended := next((token for token in tokens if token and answer.rstrip().endswith(token)), ""):
        answer = answer.rstrip().removesuffix(ended)
    return len(answer)


def _says_something(turn: Mapping[str, Any]) -> bool:
    return bool((turn.get("content") or "").strip() or turn.get("tool_calls"))


def turns_sha256(turns: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of the roles and texts of a prompt's turns, in hexadecimal.

    It does not depend on the text that a template puts around the turns, such as today's date, nor on surrounding
    blanks, which templates strip.
    """
    texts = [
        (turn["role"], (turn.get("content") or "").strip(), *([turn["tool_calls"]] if turn.get("tool_calls") else []))
        for turn in turns
    ]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
