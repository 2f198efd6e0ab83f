"""``--set KEY=VALUE``: changing one key of a cluster or policy file without editing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hsplit.config.cluster import BUDGET_FIELDS, ServerConfig
from hsplit.config.files import parse_yaml
from hsplit.config.job import Job
from hsplit.config.policy import Policy
from hsplit.config.section import KeyPath, Refusal, allowed_instead, shown
from hsplit.errors import InputError

SECTIONS = ("server", "clients", "job", "policy")

# Sections that hold one key only: another key replaces the first one.
_ONE_KEY_SECTIONS = frozenset({"partition", *BUDGET_FIELDS})

Overrides = Sequence[str] | Mapping[str, Any]


@dataclass(frozen=True)
class Override:
    """One key as the user wrote it and the value that it gets."""

    key: str
    value: Any

    @property
    def where(self) -> str:
        """What an error names instead of a file."""
        return f"--set {self.key if self.key.isprintable() else shown(self.key)}"

    def path(self, document: Mapping[str, Any]) -> KeyPath:
        """Where the key is in ``document``; a client group's name becomes its index.

        Raises:
            InputError: the key names nothing that there is.
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
        """``document`` with the key set; ``document`` itself stays as it is."""
        changed: dict[str, Any] = _replaced(document, self.path(document), self.value)
        return changed

    def _client_path(self, key: str, groups: Any) -> KeyPath:
        entries = groups if isinstance(groups, list | tuple) else ()
        names = [entry.get("name") if isinstance(entry, Mapping) else None for entry in entries]
        # a name may hold dots itself, so the longest name that fits is the one meant
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


def parse_overrides(given: Overrides) -> list[Override]:
    """The overrides in ``given``: ``key=value`` strings, whose values are YAML, or a mapping of dotted keys.

    Raises:
        InputError: a string has no ``=``, or its value is no YAML, or a mapping's key is no text.
    """
    if isinstance(given, Mapping):
        for key in given:
            if not isinstance(key, str):
                raise InputError(f"overrides: a key must be text (got {shown(key)})")
        return [Override(key, value) for key, value in given.items()]
    overrides = []
    for text in [given] if isinstance(given, str) else given:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set {shown(text)}: must be KEY=VALUE, such as job.rounds=3")
        override = Override(key.strip(), None)
        overrides.append(Override(override.key, parse_yaml(value, override.where)))
    return overrides


def below(path: KeyPath, refused: Refusal) -> Refusal:
    """``refused`` with its key cut to what is below ``path``, or whole if it is elsewhere."""
    inside = refused.at[: len(path)] == path
    return Refusal(refused.at[len(path) :], refused.reason) if inside else refused


def _replaced(tree: Any, path: KeyPath, value: Any) -> Any:
    """``tree`` with ``value`` at ``path``; a scalar on the way is replaced by a mapping."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(head, int):
        return [_replaced(entry, rest, value) if index == head else entry for index, entry in enumerate(tree)]
    inner = tree.get(head) if isinstance(tree, Mapping) else None
    if head in _ONE_KEY_SECTIONS and rest:
        inner = None
    return {**(tree if isinstance(tree, Mapping) else {}), head: _replaced(inner, rest, value)}
