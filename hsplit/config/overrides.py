"""``--set KEY=VALUE``: changing one key of a cluster or policy file without editing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hsplit.config.cluster import BUDGET_FIELDS, ServerConfig
from hsplit.config.job import Job
from hsplit.config.policy import Policy
from hsplit.config.reading import parse_yaml
from hsplit.config.section import KeyPath, Refusal, allowed_instead, shown
from hsplit.errors import InputError

SECTIONS = ("server", "clients", "job", "policy")

# Sections that hold one key only: another key replaces the first one.
_ONE_KEY_SECTIONS = frozenset({"partition", *BUDGET_FIELDS})

Overrides = Sequence[str] | Mapping[str, Any]


@dataclass(frozen=True)
class Override:
    """One key as the user wrote it, with its new value."""

    key: str
    value: Any

    @property
    def where(self) -> str:
        """The option that an error names instead of a file."""
        return f"--set {self.key if self.key.isprintable() else shown(self.key)}"

    def path(self, document: Mapping[str, Any]) -> KeyPath:
        """Path of the key in ``document``; a client group's name becomes its index.

        Raises:
            InputError: there is no such key.
        """
        head, *rest = parts = self.key.split(".")
        if not all(parts):
            raise InputError(f"{self.where}: must be keys joined by single dots, such as job.rounds")
        if head == "clients" and rest:
            return self._client_path(".".join(rest), document.get("clients"))
        if head in SECTIONS:
            return tuple(parts)
        if head in Job.model_fields:
            return ("job", *parts)
        raise InputError(f"{self.where}: unknown key ({self._instead(head)})")

    def applied_to(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of ``document`` with the key set."""
        changed: dict[str, Any] = _replaced(document, self.path(document), self.value)
        return changed

    def _client_path(self, key: str, groups: Any) -> KeyPath:
        entries = groups if isinstance(groups, list | tuple) else ()
        names = [entry.get("name") if isinstance(entry, Mapping) else None for entry in entries]
        # A name may have dots itself, so the longest name that fits is meant.
        fitting = [name for name in names if isinstance(name, str) and key.startswith(f"{name}.")]
        if not fitting:
            known = [name for name in names if isinstance(name, str)]
            hint = allowed_instead(key.split(".")[0], known)
            raise InputError(f"{self.where}: must be clients.NAME.KEY with the name of a group ({hint})")
        name = max(fitting, key=len)
        return ("clients", names.index(name), *key[len(name) + 1 :].split("."))

    def _instead(self, head: str) -> str:
        for section, model in (("policy", Policy), ("server", ServerConfig)):
            if head in model.model_fields:
                return f"did you mean '{section}.{head}'?"
        return allowed_instead(head, (*Job.model_fields, *SECTIONS))


def parse_overrides(overrides: Overrides) -> list[Override]:
    """Parse ``key=value`` strings, whose values are YAML, or a mapping of dotted keys.

    Raises:
        InputError: a string has no ``=``, its value is not YAML, or a mapping's key is not text.
    """
    if isinstance(overrides, Mapping):
        for key in overrides:
            if not isinstance(key, str):
                raise InputError(f"overrides: a key must be text (got {shown(key)})")
        return [Override(key, value) for key, value in overrides.items()]
    parsed = []
    for text in [overrides] if isinstance(overrides, str) else overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set {shown(text)}: must be KEY=VALUE, such as job.rounds=3")
        override = Override(key.strip(), None)
        parsed.append(Override(override.key, parse_yaml(value, override.where)))
    return parsed


def below(path: KeyPath, refused: Refusal) -> Refusal:
    """``refused`` with its key relative to ``path``, or unchanged if it is not below ``path``."""
    inside = refused.at[: len(path)] == path
    return Refusal(refused.at[len(path) :], refused.reason) if inside else refused


def _replaced(tree: Any, path: KeyPath, value: Any) -> Any:
    """A copy of ``tree`` with ``value`` at ``path``; a scalar on the way is replaced by a mapping."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(head, int):
        return [_replaced(entry, rest, value) if index == head else entry for index, entry in enumerate(tree)]
    inner = tree.get(head) if isinstance(tree, Mapping) else None
    if head in _ONE_KEY_SECTIONS and rest:
        inner = None
    return {**(tree if isinstance(tree, Mapping) else {}), head: _replaced(inner, rest, value)}
