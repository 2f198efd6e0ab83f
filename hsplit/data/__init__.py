"""Examples: their sources, their partition over the clients, and batches of their tokens."""

from hsplit.data.batches import Batch, ExampleSampler, collate, validation_batches
from hsplit.data.chat import ChatTemplate, template_of
from hsplit.data.examples import Example, TokenizedExample
from hsplit.data.holdout import hold_out, split_off_test
from hsplit.data.partition import partition
from hsplit.data.restaurants import restaurants
from hsplit.data.rows import absolute_source, source_sha256
from hsplit.data.sources import Reading, read_data, read_source
from hsplit.data.text_files import file_sha256
from hsplit.data.tokens import check_ids, check_special_tokens, largest_id, padding_id, tokenize

__all__ = [
    "Batch",
    "ChatTemplate",
    "Example",
    "ExampleSampler",
    "Reading",
    "TokenizedExample",
    "absolute_source",
    "check_ids",
    "check_special_tokens",
    "collate",
    "file_sha256",
    "hold_out",
    "largest_id",
    "padding_id",
    "partition",
    "read_data",
    "read_source",
    "restaurants",
    "source_sha256",
    "split_off_test",
    "template_of",
    "tokenize",
    "validation_batches",
]
