"""Chat conversations as prompt and response, through the model's own chat template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from hsplit.data.text_files import is_unicode
from hsplit.errors import InputError

# Further inputs of templates beside the turns; without them the prompt would not be the one that the row means.
_BESIDE_MESSAGES = ("tools", "functions", "documents", "chat_template_kwargs")
# Keys by which data sets mark a turn as trained on, with the value that is served: the last turn is trained on.
_TRAINED_ON = {"weight": 1, "train": True, "training": True, "loss": True, "masked": False}
# Attempts to render prompt and whole conversation within one tick of a clock that the template shows.
_ATTEMPTS = 3


class ChatTemplate(Protocol):
    """The model's chat template, as a function of the conversation."""

    def __call__(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """Render the conversation, on request with the header of the assistant's next answer."""
        ...


def conversation_texts(messages: Any, chat: ChatTemplate | None, where: str) -> tuple[str, str]:
    """Render prompt and response of a conversation that ends with an assistant turn.

    The prompt is every turn but the last, with the header of an answer, as in generation; the response is the text that
    the template adds for the last turn. Line ends after the template's end-of-turn token are dropped, so that the
    token, where it is the tokenizer's eos, is the last one and is not added twice.

    Args:
        messages: the decoded JSON value, checked here.
        chat: the model's template, None if it has none.
        where: file and line, for messages.

    Raises:
        InputError: for anything but a list of turns ``{"role": …, "content": …}`` with texts of which the
            last is the assistant's and not blank; for a turn that is marked as not trained on, or with a weight;
            without a template; and for a template that renders the prompt in another way within the whole
            conversation, so that the two cannot be separated.
    """
    turns = _turns(messages, where)
    if chat is None:
        raise InputError(
            f"{where}: messages need a model with a chat template; this one has none: use prompt and response"
        )
    try:
        for _ in range(_ATTEMPTS):
            prompt = chat(turns[:-1], add_generation_prompt=True)
            whole = chat(turns, add_generation_prompt=False)
            if whole.startswith(prompt):
                break
    except Exception as error:  # a template is a program of the model's author and may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        refused = f"{where}: the model's chat template refuses these messages"
        raise InputError(f"{refused}: {reason}", refused) from None
    response = whole.removeprefix(prompt).rstrip("\n")
    if not whole.startswith(prompt) or not response.strip():
        raise InputError(
            f"{where}: the model's chat template does not put the answer behind the prompt: use prompt and response"
        )
    return prompt, response


def turns_sha256(turns: Sequence[Mapping[str, str]]) -> str:
    """SHA-256 of the roles and texts of a prompt's turns, in hexadecimal.

    It does not depend on the text that a template puts around the turns, such as today's date, nor on surrounding
    blanks, which templates strip.
    """
    texts = [(turn["role"], turn["content"].strip()) for turn in turns]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def refuse_other_keys(fields: Mapping[str, Any], where: str) -> None:
    """Refuse a row whose template would need more than the messages.

    Args:
        fields: the row.
        where: file and line, for messages.

    Raises:
        InputError: the row has tools, documents or the like, and not an empty one.
    """
    for key in _BESIDE_MESSAGES:
        if fields.get(key):
            raise InputError(
                f"{where}: {key} beside messages cannot be given to the chat template; take {key} out of the row, "
                "or write them into a system turn"
            )


def _turns(messages: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or len(messages) < 2:
        raise InputError(f"{where}: messages must be a list of at least two turns, the last one the assistant's")
    for number, turn in enumerate(messages, start=1):
        texts = [turn.get(key) for key in ("role", "content")] if isinstance(turn, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f'{where}: messages: turn {number} must be {{"role": text, "content": text}}')
        if not all(is_unicode(str(text)) for text in texts):
            raise InputError(f"{where}: messages: turn {number} holds half of a surrogate pair; must be valid Unicode")
        for key, served in _TRAINED_ON.items():
            if turn.get(key) not in (None, served):
                raise InputError(
                    f"{where}: messages: turn {number}: {key} must be {json.dumps(served)} or left out: the last turn "
                    "is trained on, the others are not"
                )
    last = messages[-1]
    if last["role"] != "assistant":
        raise InputError(
            f"{where}: messages: the last turn is the {last['role']}'s; must be the assistant's",
            f"{where}: messages: the last turn must be the assistant's",
        )
    if not last["content"].strip():
        raise InputError(f"{where}: messages: the assistant's last turn is blank; must be a text")
    return messages
