"""Seeds that depend on their purpose alone, so that a resumed run repeats every draw."""

from __future__ import annotations

import hashlib


def hash_seed(*parts: object) -> int:
    """A 63-bit seed that depends on ``parts`` alone."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "big") >> 1
