"""Small tokenizers of the kinds that models have: byte-level BPE, and BPE that marks spaces, as SentencePiece does."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TURNS = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
HEADER = "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
TEMPLATES = {
    "no bos": TURNS + HEADER,
    "bos": "{{ bos_token }}" + TURNS + HEADER,
    # No line end behind the prompt: the answer begins with a space, or right behind a letter.
    "inst": "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def _finished(words: Tokenizer, specials: tuple[str, ...], template: str, leading_bos: bool) -> PreTrainedTokenizerFast:
    words.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in specials])
    if leading_bos:
        bos = words.token_to_id("<s>")
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    made = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = TEMPLATES[template]
    return made


def byte_level(template: str = "no bos", *, add_prefix_space: bool = False) -> PreTrainedTokenizerFast:
    """Bytes, with merges of a space or line end and what follows, as GPT-2's; no bos of its own accord."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[byte] = len(vocabulary)
    merges = [("\u0120", letter) for letter in LETTERS] + [("\u010a", "\u010a"), ("\u0120", "\u0120"), ("i", "s")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    words = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=True)
    words.decoder = decoders.ByteLevel()
    return _finished(words, ("<unk>", "<s>", "</s>"), template, leading_bos=False)


def space_marking(template: str = "no bos", *, scheme: str = "prepend") -> PreTrainedTokenizerFast:
    """As Llama 2's: byte fallback, a bos, and a space before a text, by a normalizer or by the pre-tokenizer."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for letter in ["\u2581", *map(chr, range(33, 127))]:
        vocabulary[letter] = len(vocabulary)
    merges = [("\u2581", letter) for letter in LETTERS] + [("\u2581", "\u2581"), ("i", "s")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    words = Tokenizer(model)
    if scheme == "prepend":
        parts: list[Any] = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        words.normalizer = normalizers.Sequence(parts)
    else:
        words.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
    undone = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    words.decoder = decoders.Sequence(undone)
    return _finished(words, ("<unk>", "<s>", "</s>"), template, leading_bos=True)


KINDS: dict[str, Any] = {
    "byte-level": byte_level,
    "byte-level, space first": lambda template="no bos": byte_level(template, add_prefix_space=True),
    "prepend": space_marking,
    "metaspace": lambda template="no bos": space_marking(template, scheme="first"),
}
