"""Examples as token ids, with the position where the response begins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hsplit.data.examples import Example, TokenizedExample
from hsplit.data.kept_tokens import kept_tokens
from hsplit.errors import InputError
from hsplit.waiting import track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 1000
"""Examples that are tokenized together."""
# Texts after which most tokenizers end a token, whatever follows.
_BORDERS = ("", "\n", ".", "a")
_MAX_NAMED = 5


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    long: str = "skip",
    cache: bool = False,
) -> tuple[list[TokenizedExample], int]:
    """Tokenize, and leave out or cut examples of more than `max_length` tokens; a text becomes several examples.

    The prompt's tokens are those of the prompt alone, from which generation starts. The response's are those that
    follow when prompt and response are tokenized as one text, so that no tokenizer inserts the space that it puts
    before a text. Where a token spans the border, which the model could not generate after the prompt, the response has
    the tokens of its own text.

    Only two special tokens are added: the bos that the tokenizer puts before every text, and the eos at the end;
    neither where the text already has it. A chat gets the bos that its template writes, or none.

    Where a part of a response is not learned, the tokens that begin in it are not.

    Args:
        examples: to tokenize.
        tokenizer: the model's; a fast one uses all cores.
        max_length: most tokens of one.
        long: ``skip`` or ``cut``; one that has nothing to learn within `max_length` is left out in either case.
        cache: keep the tokens of :data:`~hsplit.data.kept_tokens.MANY` or more examples in the user's cache directory,
            and take them from there.

    Returns:
        The examples that fit, in their order, and the number of those that do not.
    """
    if not examples:
        return [], 0
    kept = kept_tokens(examples, tokenizer, f"{max_length} {long}") if cache else None
    if kept is not None and (found := kept.get()) is not None:
        return found
    first = _leading_bos(tokenizer)
    last = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    fitting, left_out = list[TokenizedExample](), 0
    starts = range(0, len(examples), AT_ONCE)
    for start in track(starts, "tokenizing", AT_ONCE, len(examples)):
        part = examples[start : start + AT_ONCE]
        for example, made in zip(part, _whole_examples(part, tokenizer, first, last), strict=True):
            if example.text:
                fitting += _pieces(made, max_length)
            elif len(made.ids) <= max_length:
                fitting.append(made)
            elif long == "cut" and (cut := made.cut(max_length)).supervised:
                fitting.append(cut)
            else:
                left_out += 1
    if kept is not None:
        kept.put(fitting, left_out)
    return fitting, left_out


def _whole_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, first: list[int], last: list[int]
) -> Iterator[TokenizedExample]:
    """Tokenize, however long they become; ``first`` and ``last`` are bos and eos, as lists of one or none."""
    prompts = _ids(tokenizer, [example.prompt for example in examples])
    wholes = _ids(tokenizer, [example.prompt + example.response for example in examples])
    offsets = _offsets(tokenizer, examples)
    for place, (example, prompt, whole) in enumerate(zip(examples, prompts, wholes, strict=True)):
        if whole[: len(prompt)] == prompt:
            response, begins = whole[len(prompt) :], offsets.get(place, [])[len(prompt) :]
        else:
            response, begins = _continuation(tokenizer, prompt, whole, example.response), []
        if first and example.turns is None and prompt[:1] != first:
            prompt = first + prompt
        spans = _token_spans(example, prompt, response, begins, tokenizer) if example.unsupervised else ()
        if last and response[-1:] != last:
            response = response + last
            if example.unsupervised and example.unsupervised[-1][1] == len(example.response):
                end = len(prompt) + len(response)
                spans = (*spans, (end - 1, end))
        yield TokenizedExample(tuple(prompt + response), len(prompt), spans)


def _pieces(text: TokenizedExample, length: int) -> list[TokenizedExample]:
    """Cut a text into pieces of ``length`` tokens; a last one of a single token has nothing to predict."""
    ids, first = text.ids, text.prompt_length
    starts = range(0, max(len(ids), 1), length)
    pieces = [TokenizedExample(ids[at : at + length], first if at == 0 else 0) for at in starts]
    return [piece for piece in pieces if piece.supervised or len(pieces) == 1]


def _offsets(tokenizer: Any, examples: Sequence[Example]) -> dict[int, list[int]]:
    """The character of its response at which each token of an example begins, where a part of it is not learned."""
    places = [place for place, example in enumerate(examples) if example.unsupervised]
    if not places or not getattr(tokenizer, "is_fast", False):
        return {}
    texts = [examples[place].prompt + examples[place].response for place in places]
    mapped = tokenizer(texts, add_special_tokens=False, verbose=False, return_offsets_mapping=True)["offset_mapping"]
    return {
        place: [begin - len(examples[place].prompt) for begin, _ in own]
        for place, own in zip(places, mapped, strict=True)
    }


def _token_spans(
    example: Example, prompt: list[int], response: list[int], begins: list[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, int], ...]:
    """The tokens that begin in an unsupervised part of the response, as spans of the whole example's tokens.

    Args:
        example: whose tokens they are.
        prompt, response: its tokens, without an eos that is in no text.
        begins: the character at which each of the response's begins; empty if it is not known.
        tokenizer: theirs.
    """
    if not begins:
        # The text of a token's predecessors ends where it begins.
        known = len(_text(tokenizer, prompt))
        begins = [len(_text(tokenizer, prompt + response[:place])) - known for place in range(len(response))]
    spans = list[tuple[int, int]]()
    for place, begin in enumerate(begins):
        if any(start <= begin < stop for start, stop in example.unsupervised):
            at = len(prompt) + place
            if spans and spans[-1][1] == at:
                spans[-1] = spans[-1][0], at + 1
            else:
                spans.append((at, at + 1))
    return tuple(spans)


def padding_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> int:
    """Choose the id to pad with: the pad token's, else the eos's, else 0; never one without an embedding.

    No result depends on it: the models are causal and padding stands on the right, so no real position attends to it,
    and it has no target. A tokenizer without a pad token, or with one that was added without the model, therefore works
    as it is.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and (vocab_size is None or token < vocab_size):
            return int(token)
    return 0


def check_special_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuse a tokenizer that puts a token without an embedding into every text.

    Raises:
        InputError: names the token, its id and the limit.
    """
    eos = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    for kind, ids in (("eos", eos), ("bos", _leading_bos(tokenizer))):
        for token in ids:
            if token >= vocab_size:
                raise InputError(
                    f"job.model: its tokenizer's {kind} token {_named(tokenizer, token)} is beyond the model's "
                    f"vocab_size {vocab_size}; give the tokenizer that the model was made with"
                )


def check_ids(
    examples: Iterable[TokenizedExample], tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str
) -> None:
    """Refuse examples with a token for which the model has no embedding.

    Args:
        examples: of `tokenizer`.
        tokenizer: the model's.
        vocab_size: the model's number of embeddings.
        where: name of the data, for messages.

    Raises:
        InputError: names the token, its id and the limit. Its discreet form (see `InputError.discreet`) names the
            tokenizer's tokens beyond the limit instead, whether or not the data hold them.
    """
    for example in examples:
        if (largest := max(example.ids, default=0)) >= vocab_size:
            remedy = "take it out of the data, or give a model that has it"
            beyond = f"beyond the model's vocab_size {vocab_size}; {remedy}"
            raise InputError(
                f"{where}: token {_named(tokenizer, largest)} is {beyond}",
                f"{where}: holds a token (its tokenizer has {_beyond(tokenizer, vocab_size)}) {beyond}",
            )


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id that the tokenizer can give, or -1."""
    return max(tokenizer.get_vocab().values(), default=-1)


def _named(tokenizer: Any, token: int) -> str:
    return f"{tokenizer.convert_ids_to_tokens(token)!r} (id {token})"


def _beyond(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str:
    ids = sorted(token for token in tokenizer.get_vocab().values() if token >= vocab_size)
    named = ", ".join(_named(tokenizer, token) for token in ids[:_MAX_NAMED])
    return named if len(ids) <= _MAX_NAMED else f"{named} and {len(ids) - _MAX_NAMED} more"


def _leading_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The bos as a list of one if the tokenizer puts it before a text by itself, as Llama's does."""
    bos = tokenizer.bos_token_id
    return [int(bos)] if bos is not None and list(tokenizer("")["input_ids"])[:1] == [bos] else []


def _continuation(tokenizer: Any, prompt: list[int], whole: list[int], response: str) -> list[int]:
    """Tokens of `response` after a prompt, where a token of the whole text spans the border.

    They are cut from the tokens of a text in which a token ends at the border. Accepted are those that decode to the
    same text, without a space that the tokenizer puts before a text.
    """
    text = _text(tokenizer, whole)
    for border in _BORDERS:
        before, both = _ids(tokenizer, [border, border + response])
        after = both[len(before) :]
        if both[: len(before)] == before and _text(tokenizer, prompt + after) == text:
            return after
    # Reached with a tokenizer that does not decode to the same text, such as one of whole words.
    return _ids(tokenizer, [response])[0]


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose=False: a text beyond the model's context is left out by max_length, so the warning would mislead.
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [list(ids) for ids in encoded]
