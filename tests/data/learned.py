"""The learned parts of an example's response."""

from __future__ import annotations

from hsplit.data.examples import Example


def learned(example: Example) -> list[str]:
    """Return what stands between the parts that are not learned."""
    begin, parts = 0, list[str]()
    for start, stop in (*example.unsupervised, (len(example.response), 0)):
        parts.append(example.response[begin:start])
        begin = stop
    return parts
