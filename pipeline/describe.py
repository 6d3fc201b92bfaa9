"""Parameters as people and editors read them: every resolved value with its origin, two files compared, and a JSON
Schema. The dataclasses and the comments behind their fields are all that this knows of parameters."""

import dataclasses
import json
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from pipeline.params import Params, read_params
from pixelgen.config import ConfigError, Variant, choose, comments, defaults_of, dotted, is_base, plain
from pixelgen.recipe import read_yaml

ABSENT = "-"
TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}


class Value(NamedTuple):
    name: str  # dotted
    value: Any
    written: bool  # in the file; otherwise a default
    comment: str


def values(path: Path) -> list[Value]:
    """Every parameter of a file, defaults too. ConfigError for what `read_params` does not accept."""
    return [*_values(read_params(path), read_yaml(path), "", "")]


def _values(value: Any, written: Any, name: str, comment: str) -> Iterator[Value]:
    if isinstance(value, Variant):
        written, name = written.get(value.kind) if isinstance(written, Mapping) else ABSENT, dotted(name, value.kind)
    told = written if isinstance(written, Mapping) else {}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _values(getattr(value, field.name), told.get(field.name, ABSENT), dotted(name, field.name),
                               comments(type(value)).get(field.name, ""))
    elif isinstance(value, dict) and any(map(dataclasses.is_dataclass, value.values())):
        for key, inner in value.items():
            yield from _values(inner, told.get(key, ABSENT), dotted(name, key), comment)
    else:
        yield Value(name, value, written != ABSENT, comment)


def show(path: Path, key: str | None) -> Iterator[str]:
    """A line for each parameter, or for those under a dotted key: name, value, origin, comment."""
    found = values(path)
    if key is not None:
        below = [v for v in found if f"{v.name}.".startswith(f"{key}.")]
        if not below:
            prefixes = {".".join(v.name.split(".")[:n]) for v in found for n in range(1, v.name.count(".") + 2)}
            choose(key, sorted(p for p in prefixes if p.count(".") <= key.count(".")), f"{path}: key")
        found = below
    rows = [(v.name, json.dumps(v.value), path.name if v.written else "default", v.comment) for v in found]
    widths = [min(max(len(row[i]) for row in rows), 48) for i in range(3)]
    for row in rows:
        yield "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()


def diff(one: Path, other: Path) -> Iterator[str]:
    """A line for each parameter that resolves to different values in two files: name and both values."""
    sides = [{v.name: json.dumps(v.value) for v in values(path)} for path in (one, other)]
    names = [name for name in {**sides[0], **sides[1]} if sides[0].get(name) != sides[1].get(name)]
    width = max(map(len, names), default=0)
    for name in names:
        yield f"{name.ljust(width)}  {sides[0].get(name, ABSENT)} -> {sides[1].get(name, ABSENT)}"


def kinds() -> Iterator[str]:
    """Lines about every kind of what there are several kinds of: its options, each with its default and meaning."""
    for base in dict.fromkeys(bases(Params)):
        for kind in base.kinds:
            cls: Any = base.of(kind)
            about = str(sys.modules[cls.__module__].__doc__).partition("\n\n")[0]
            yield f"{base.__name__} {kind}: {' '.join(about.split())}"
            for name, default in defaults_of(cls, dataclasses.MISSING).items():
                usual = "(needed)" if default is dataclasses.MISSING else json.dumps(plain(default))
                yield f"  {name:<20}  {usual:<24}  {comments(cls).get(name, '')}".rstrip()


def bases(hint: Any) -> Iterator[type[Variant]]:
    """What there are several kinds of in a type."""
    if is_base(hint):
        yield hint
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        for inner in get_type_hints(hint).values():
            yield from bases(inner)
    for inner in get_args(hint):
        yield from bases(inner)


def schema() -> dict[str, Any]:
    """A JSON Schema of params.yaml."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "params.yaml of PixelGen",
            **_schema(Params)}


def _schema(hint: Any) -> dict[str, Any]:
    origin, args = get_origin(hint), get_args(hint)
    if is_base(hint):
        return {"type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": False,
                "properties": {kind: _schema(hint.of(kind)) for kind in hint.kinds}}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        hints, said = get_type_hints(hint), comments(hint)
        properties: dict[str, Any] = {}
        defaults = defaults_of(hint, dataclasses.MISSING)
        for name, default in defaults.items():
            properties[name] = found = _schema(hints[name])
            if name in said:
                found["description"] = said[name]
            if default is not dataclasses.MISSING:
                found["default"] = plain(default)
        return {"type": "object", "properties": properties, "additionalProperties": False,
                "required": [name for name, default in defaults.items() if default is dataclasses.MISSING]}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(inner) for inner in args]}
    if hint is type(None):
        return {"type": "null"}
    if origin is Literal:
        return {"enum": [*args]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(args[1])}
    if origin is tuple:
        if args[-1] is Ellipsis:
            return {"type": "array", "items": _schema(args[0])}
        return {"type": "array", "prefixItems": [_schema(a) for a in args], "minItems": len(args), "items": False}
    if hint not in TYPES:
        raise ConfigError(f"no JSON Schema is known for {hint}")
    return {"type": TYPES[hint]}
