"""Tables of the keys of cluster and policy files, made from the models that read them.

``python -m docs.configuration_keys`` prints them all.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from hsplit.config.cluster import ClientGroup, Distribution, ScheduledChange, ServerConfig
from hsplit.config.job import (
    DataSpec,
    FastPaths,
    Faults,
    Job,
    MixturePart,
    Partition,
    Pipeline,
    Privacy,
    ResidualConfig,
    Validation,
)
from hsplit.config.policy import Importance, Objective, Pace, Policy, Replan, SelfPruning
from hsplit.config.section import LARGEST, REFERENCE, OneKey

SECTIONS: dict[str, type[BaseModel]] = {
    model.__name__: model
    for model in (
        *(ServerConfig, ClientGroup, Distribution, ScheduledChange),
        *(Job, DataSpec, MixturePart, Partition, Validation, Privacy, ResidualConfig, Pipeline, Faults, FastPaths),
        *(Policy, Pace, Importance, Replan, Objective, SelfPruning),
    )
}
"""Every section of a cluster or a policy file, by its model's name."""

_TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "`true`, `false`",
    "null": "`null`",
}


def keys_of(name: str) -> str:
    """The Markdown table of a section's keys: allowed values, default and meaning of each."""
    model = SECTIONS[name]
    schema = model.model_json_schema()
    rows = ["| key | what it may be | default | meaning |", "|---|---|---|---|"]
    for key, field in model.model_fields.items():
        own = schema["properties"][key]
        if "$ref" in own:
            own = {**own, "type": "section"}
        if field.is_required():
            default = "required"
        elif field.default is None and issubclass(model, OneKey):
            # One of its keys is given, so none has a default.
            default = ""
        else:
            default = _as_yaml(field.get_default(call_default_factory=True))
        alternatives = [words for words in _allowed(own, schema.get("$defs", {})) if default or words != "`null`"]
        what = "; ".join(alternatives) + _lower_bound(model, key, own)
        rows.append(f"| `{key}` | {what} | {default} | {own['description']} |")
    return "\n".join(rows) + "\n"


def _as_yaml(value: Any) -> str:
    """A default as a YAML file has it."""
    if isinstance(value, BaseModel):
        return "as its keys'"
    if isinstance(value, tuple):
        value = list(value)
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"


def _allowed(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[str]:
    """Yield the alternatives of a value, in words."""
    if reference := schema.get("$ref"):
        name = reference.rpartition("/")[2]
        yield f"[{name_of(name)}](#{anchor_of(name)})"
        return
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        for choice in choices:
            yield from _allowed(choice, definitions)
        return
    if "const" in schema:
        yield f"`{schema['const']}`"
        return
    if "enum" in schema:
        yield ", ".join(f"`{value}`" for value in schema["enum"])
        return
    if schema.get("pattern") == REFERENCE:
        yield "`package.module:name`"
        return
    kind = schema["type"]
    if kind == "array":
        items = schema.get("items") or schema["prefixItems"][0]
        size = f"{len(schema['prefixItems'])} × " if "prefixItems" in schema else ""
        yield f"list: {size}{' or '.join(_allowed(items, definitions))}"
    elif kind == "object":
        yield f"mapping, each: {' or '.join(_allowed(schema['additionalProperties'], definitions))}"
    else:
        yield _TYPES[kind] + _bounds(schema)


def _bounds(schema: Mapping[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = {key: schema[key] for key in signs if key in schema}
    # The bound of every number is stated once, above the tables.
    if bounds.get("maximum") == LARGEST:
        del bounds["maximum"]
    return ",".join(f" {signs[key]} {_figure(bound)}" for key, bound in bounds.items())


def _figure(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"


def _lower_bound(model: type[BaseModel], key: str, schema: Mapping[str, Any]) -> str:
    """The bound of a budget, which its schema lacks: it holds for a number and for every draw."""
    if "oneOf" not in schema or "#/$defs/Distribution" not in json.dumps(schema):
        return ""
    field = model.model_fields[key]
    try:
        TypeAdapter(Annotated[field.annotation, *field.metadata]).validate_python(0.0)
    except ValidationError:
        return "; each > 0"
    return "; each ≥ 0"


def name_of(model: str) -> str:
    """Return the name of a section in the reference."""
    return _NAMES[model]


def anchor_of(model: str) -> str:
    """Return the anchor of a section within its page of the reference."""
    return name_of(model).replace(" ", "-")


_NAMES = {
    "ServerConfig": "server",
    "ClientGroup": "client",
    "Distribution": "distribution",
    "ScheduledChange": "scheduled change",
    "Job": "job",
    "DataSpec": "data",
    "MixturePart": "source of a mixture",
    "Partition": "partition",
    "Validation": "validation",
    "Privacy": "privacy",
    "ResidualConfig": "residual",
    "Pipeline": "pipeline",
    "Faults": "faults",
    "FastPaths": "fast",
    "Policy": "policy",
    "Objective": "objective",
    "Pace": "pace",
    "Importance": "importance",
    "Replan": "replan",
    "SelfPruning": "self-pruning",
}


def main() -> None:
    """Print the tables."""
    for name, model in SECTIONS.items():
        print(f"## {name_of(name)}\n\n{inspect.getdoc(model)}\n\n{keys_of(name)}")


if __name__ == "__main__":
    main()
