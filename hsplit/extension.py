"""A user's own aggregation, rank rule, split rule or importance metric, found by ``package.module:name``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

from hsplit.config.section import is_reference
from hsplit.errors import InputError

Part = TypeVar("Part")


def find_part(word: str, built_in: Mapping[str, Part], key: str, kind: type | tuple[type, ...] = ()) -> Part | Any:
    """What a policy's ``key`` means: a built-in part by its name, or a user's own.

    A user's module must be importable on every node: installed there, or in the directory that the run is started
    from. Importing it runs its code.

    Args:
        word: a name in ``built_in``, or ``package.module:name``.
        built_in: the registry.
        key: for messages, such as ``policy: aggregation``.
        kind: what a user's own may be instead of a function.

    Raises:
        InputError: there is no such module or name, it cannot be imported, or it cannot be called.
    """
    if word in built_in:
        return built_in[word]
    if not is_reference(word):
        raise InputError(f"{key}: must be one of {', '.join(built_in)}, or package.module:name (got {word!r})")
    module_name, _, name = word.partition(":")
    try:
        module = _imported(module_name)
    except ModuleNotFoundError as error:
        why = f"no module named {error.name!r} (it must be importable on every node)"
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


def _imported(module: str) -> Any:
    """The module, looked for in the working directory too, as ``python -m`` does."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    return importlib.import_module(module)
