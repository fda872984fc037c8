"""Settings as frozen dataclasses, read from the command line or from a mapping such as `wandb.config`.

A field made with `option(...)` carries its help text, limits and aliases; its annotation gives the type. The flags (`-`
and `_` are equivalent), checks and one-line error messages are derived from these.
"""

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from errors import UserError

Settings = TypeVar("Settings")
MOST_SEED = 2**31 - 1


def option(
    default: Any,
    help: str,
    *,
    aliases: Sequence[str] = (),
    choices: Sequence[Any] = (),
    low: float | None = None,
    high: float | None = None,
    group: str = "options",
) -> Any:
    """A dataclass field with what the command line and the checks need. low, high: the allowed range, inclusive."""
    metadata = dict(help=help, aliases=tuple(aliases), choices=tuple(choices), low=low, high=high, group=group)
    return dataclasses.field(default=default, metadata=metadata)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def element_type(annotation: Any) -> tuple[type, bool]:
    """(type of one value, whether a comma list of them is meant) of a field's annotation; `X | None` counts as X."""
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], True
    return annotation, False


def convert(text: Any, kind: type) -> Any:
    """One value of type `kind` from a flag's text or a mapping's value; ValueError if it is of another type."""
    if kind is bool:
        names = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(text).lower() not in names:
            raise ValueError
        return names[str(text).lower()]
    if isinstance(text, bool) or not isinstance(text, str | int | float | Path):
        raise ValueError
    if kind is Path and not str(text):  # Path("") would be the current folder
        raise ValueError
    if kind is int and isinstance(text, float) and not text.is_integer():
        raise ValueError
    value = kind(text)
    if kind is float and not math.isfinite(value):
        raise ValueError
    return value


KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a name", Path: "a path"}
METAVARS = {int: "N", float: "X", str: "NAME", Path: "PATH"}


def checked(field: dataclasses.Field, value: Any) -> Any:
    """`value` converted to the field's type and within its limits; UserError that names the flag if not.

    None means the default, and so does an empty list if the default is an empty tuple.
    """
    kind, many = element_type(field.type)
    if value is None or (many and field.default == () and value in ((), [])):
        return field.default
    meta = field.metadata
    limits = [f"one of {', '.join(map(str, meta['choices']))}"] if meta["choices"] else [KIND_NAMES[kind]]
    limits += [f"at least {meta['low']}"] if meta["low"] is not None else []
    limits += [f"at most {meta['high']}"] if meta["high"] is not None else []
    expected = ("a comma-separated list, each " if many else "") + ", ".join(limits)
    parts = [value] if not many else value.split(",") if isinstance(value, str) else value
    if many and not isinstance(parts, list | tuple):
        parts = [parts]
    try:
        values = [convert(part.strip() if isinstance(part, str) else part, kind) for part in parts]
    except (ValueError, TypeError):
        values = None
    if not values or any(
        (meta["choices"] and v not in meta["choices"])
        or (meta["low"] is not None and not v >= meta["low"])
        or (meta["high"] is not None and not v <= meta["high"])
        for v in values
    ):
        raise UserError(f"{flag(field.name)} is {value!r}; expected {expected}")
    return tuple(values) if many else values[0]


def from_mapping(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """`settings` with fields replaced, under their own names or aliases; refuses unknown and ill-typed ones."""
    fields = {f.name: f for f in dataclasses.fields(settings)}
    names = {alias.replace("-", "_"): f.name for f in fields.values() for alias in f.metadata["aliases"]}
    changes: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        name = names.get(name, name)
        if name not in fields:
            raise UserError(f"unknown parameter {key!r}; known ones are {', '.join(sorted(fields))}")
        if name in changes:
            raise UserError(f"{flag(name)} is given twice, under two names")
        changes[name] = checked(fields[name], value)
    return dataclasses.replace(settings, **changes)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`s: one line, exit code 2."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; see --help")


def parse(kind: type[Settings], description: str, argv: Sequence[str]) -> Settings:
    """Settings of the dataclass `kind` from flags. Errors name the flag and what it expects."""
    parser = OneLineParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    groups: dict[str, Any] = {"options": parser}  # argparse's own group, where --help stands
    booleans: dict[str, dataclasses.Field] = {}
    for field in dataclasses.fields(kind):
        meta = field.metadata
        if meta["group"] not in groups:
            groups[meta["group"]] = parser.add_argument_group(meta["group"])
        group = groups[meta["group"]]
        names = [flag(field.name), *(flag(alias) for alias in meta["aliases"])]
        value_type, many = element_type(field.type)
        default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        default = "yes" if default is True else default
        shown = "" if field.default in (None, (), False, "") else f" (default: {default})"
        common = dict(dest=field.name, default=None, help=(meta["help"] + shown).replace("%", "%%"))
        if value_type is bool:
            group.add_argument(*names, action=argparse.BooleanOptionalAction, **common)
            booleans.update(dict.fromkeys(names, field))
        else:
            choices = "{" + ",".join(map(str, meta["choices"])) + "}" if meta["choices"] else None
            metavar = choices or METAVARS[value_type]
            group.add_argument(*names, metavar=f"{metavar},..." if many else metavar, **common)
    given = vars(parser.parse_args([normalised(token, booleans) for token in argv]))
    return from_mapping(kind(), {name: value for name, value in given.items() if value is not None})


def normalised(token: str, booleans: Mapping[str, dataclasses.Field]) -> str:
    """A flag with `_` written as `-`, and `--x=true` or `--x=false` as `--x` or `--no-x`; anything else unchanged."""
    if not token.startswith("--"):
        return token
    name, equals, value = token.partition("=")
    name = name.replace("_", "-")
    if equals and name in booleans:
        return name if checked(booleans[name], value) else f"--no-{name[2:]}"
    return name + equals + value


def to_argv(settings: Any) -> list[str]:
    """The flags that give `settings`: those that differ from their defaults. `parse` reads them back."""
    argv = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value == field.default:
            continue
        if isinstance(value, bool):
            argv.append(flag(field.name if value else f"no_{field.name}"))
        else:
            argv += [flag(field.name), ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return argv
