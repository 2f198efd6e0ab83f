"""A user's own aggregation, rank rule, split rule or importance metric, found by ``package.module:name``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

from hsplit.config.section import is_reference
from hsplit.errors import InputError

Part = TypeVar("Part")


def find_part(word: str, built_in: Mapping[str, Part], key: str, kind: type | tuple[type, ...] = ()) -> Part | Any:
    """Find a part that a policy names: a built-in one, or a user's own.

    A user's module must be importable on every node: installed there, or on its ``PYTHONPATH``. It is not looked for
    in the working directory, whose files may be from others. Importing it runs its code.

    Args:
        word: a name in ``built_in``, or ``package.module:name``.
        built_in: the registry.
        key: of the policy, for messages, such as ``policy: aggregation``.
        kind: types that a user's own part may have instead of a function.

    Raises:
        InputError: there is no such module or name, it is Python's own, cannot be imported, or cannot be called.
    """
    if word in built_in:
        return built_in[word]
    if not is_reference(word):
        raise InputError(f"{key}: must be one of {', '.join(built_in)}, or package.module:name (got {word!r})")
    module_name, _, name = word.partition(":")
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise InputError(
            f"{key}: {word}: the module {module_name} is Python's own; give one that was written for hsplit"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        why = f"no module named {error.name!r} (it must be installed, or on the PYTHONPATH, on every node)"
        raise InputError(f"{key}: {word}: {why}") from None
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise InputError(
            f"{key}: {word}: importing {module_name} failed: {type(error).__name__}: {reason[0] if reason else ''}"
        ) from error
    part = getattr(module, name, None)
    if part is None:
        raise InputError(f"{key}: {word}: the module {module_name} has no {name!r}")
    if not callable(part) and not isinstance(part, kind):
        raise InputError(f"{key}: {word}: must be a function (got {type(part).__name__})")
    return part


def origin(word: str) -> str:
    """The file that a user's own part ``package.module:name`` was loaded from."""
    module_name = word.partition(":")[0]
    return str(getattr(sys.modules.get(module_name), "__file__", None) or module_name)
