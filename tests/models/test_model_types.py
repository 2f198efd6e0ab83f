"""The page of model types says what is so."""

from __future__ import annotations

import re

import pytest

from docs.model_types import PAGE, find, model_types
from hsplit.models.families import FAMILIES
from hsplit.models.packed_types import PACKED_TYPES

_ROW = re.compile(r"\| `([\w-]+)` \| (exact, packed|exact, padded|refused) \|")


def _rows() -> dict[str, str]:
    return dict(_ROW.findall(PAGE.read_text(encoding="utf-8")))


def test_the_page_has_every_type_and_agrees_with_the_code() -> None:
    rows = _rows()
    assert sorted(rows) == model_types()
    written = {kind for family in FAMILIES for kind in family.model_types}
    assert {kind for kind, how in rows.items() if how == "exact, packed"} == written | PACKED_TYPES
    exact = sum(how != "refused" for how in rows.values())
    assert exact >= 100
    assert f"{len(rows)} types, {exact} exact" in PAGE.read_text(encoding="utf-8")


@pytest.mark.drill
def test_every_type_is_what_the_page_says() -> None:
    rows = _rows()
    found = {one.kind: one.row for one in find(model_types())}
    assert {kind: match[2] for kind, row in found.items() if (match := _ROW.match(row))} == rows
