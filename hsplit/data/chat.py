"""Chat conversations as prompt and response, through the model's own chat template."""

from __future__ import annotations

from typing import Any, Protocol

from hsplit.data.files import is_unicode
from hsplit.errors import InputError


class ChatTemplate(Protocol):
    """The model's chat template, as a function of the conversation."""

    def __call__(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """The text of the conversation, on demand with the header of the assistant's next answer."""
        ...


def conversation_texts(messages: Any, chat: ChatTemplate | None, where: str) -> tuple[str, str]:
    """Prompt and response of a conversation that ends with an assistant turn.

    The prompt is every turn but the last, with the header of an answer, as the model is asked when it
    generates; the response is what the template adds for the last turn. Line ends behind the template's
    end-of-turn token are dropped, so that the token, where it is the tokenizer's eos, is the last one and is
    not added twice.

    Args:
        messages: the decoded JSON value, checked here.
        chat: the model's template, None if it has none.
        where: file and line, for messages.

    Raises:
        InputError: for anything but a list of turns ``{"role": …, "content": …}`` with texts of which the
            last is the assistant's and not blank; without a template; and for a template that words a prompt
            and the whole conversation differently, so that no prompt can be told apart.
    """
    turns = _turns(messages, where)
    if chat is None:
        raise InputError(
            f"{where}: messages need a model with a chat template; this one has none: use prompt and response"
        )
    try:
        prompt = chat(turns[:-1], add_generation_prompt=True)
        whole = chat(turns, add_generation_prompt=False)
    except Exception as error:  # a template is a program of the model's author, raising what it likes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{where}: the model's chat template refuses these messages: {reason}") from None
    response = whole.removeprefix(prompt).rstrip("\n")
    if not whole.startswith(prompt) or not response.strip():
        raise InputError(
            f"{where}: the model's chat template does not put the answer behind the prompt: use prompt and response"
        )
    return prompt, response


def _turns(messages: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or len(messages) < 2:
        raise InputError(f"{where}: messages must be a list of at least two turns, the last one the assistant's")
    for number, turn in enumerate(messages, start=1):
        texts = [turn.get(key) for key in ("role", "content")] if isinstance(turn, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f'{where}: messages: turn {number} must be {{"role": text, "content": text}}')
        if not all(is_unicode(str(text)) for text in texts):
            raise InputError(f"{where}: messages: turn {number} holds half of a surrogate pair; must be valid Unicode")
    last = messages[-1]
    if last["role"] != "assistant":
        raise InputError(f"{where}: messages: the last turn is the {last['role']}'s; must be the assistant's")
    if not last["content"].strip():
        raise InputError(f"{where}: messages: the assistant's last turn is blank; must be a text")
    return messages
