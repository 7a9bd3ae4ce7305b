"""A YAML file as plain data that knows its lines, so that errors name line and key. The safe loader only."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import PlanError
from .names import did_you_mean

Key = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """A mapping, where it is from, and the line of each key."""

    value: Mapping[str, Any]
    name: str
    lines: Mapping[Key, int] = field(default_factory=dict)

    def error(self, key: Key, text: str) -> PlanError:
        line = next((self.lines[key[:n]] for n in range(len(key), -1, -1) if key[:n] in self.lines), None)
        return PlanError(f"{self.name}{'' if line is None else f':{line}'}: {text}")

    def only(
        self, known: typing.Iterable[str], key: Key = (), value: Mapping[str, Any] | None = None
    ) -> None:
        """Refuse keys that nobody knows."""
        known = list(known)
        for name in self.value if value is None else value:
            if name not in known:
                raise self.error((*key, name), f"unknown key {name!r}{did_you_mean(str(name), known)}")


def read(given: str | os.PathLike[str]) -> Document:
    """The YAML file at a path; a string of several lines is taken for the text itself."""
    name = "the given text"
    if isinstance(given, str) and "\n" in given:
        text = given
    else:
        name = os.fspath(given)
        try:
            text = Path(given).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise PlanError(f"{name}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{name}: {error}") from error
    try:
        # events are looked at first: an alias would let a small text stand for a huge value
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                at = f":{event.start_mark.line + 1}" if event.start_mark else ""
                raise PlanError(f"{name}{at}: aliases are not read, write the value out")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark: yaml.Mark | None = error.problem_mark
        line = "" if mark is None else f":{mark.line + 1}"
        raise PlanError(f"{name}{line}: not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise PlanError(f"{name}: not YAML: {error}") from error
    lines: dict[Key, int] = {}
    value = _plain(root, (), lines, name)
    if not isinstance(value, dict):
        raise PlanError(f"{name}: expected a mapping of keys to values")
    return Document(value, name, lines)


def _plain(node: yaml.Node | None, key: Key, lines: dict[Key, int], name: str) -> Any:
    if isinstance(node, yaml.MappingNode):
        found: dict[Any, Any] = {}
        for k, v in node.value:
            line = k.start_mark.line + 1
            word = _plain(k, key, lines, name)
            if not isinstance(word, str):
                raise PlanError(f"{name}:{line}: the key {word!r} is no text")
            if word in found:
                raise PlanError(f"{name}:{line}: the key {word!r} is there twice")
            lines[(*key, word)] = line
            found[word] = _plain(v, (*key, word), lines, name)
        return found
    if isinstance(node, yaml.SequenceNode):
        items = []
        for i, item in enumerate(node.value):
            lines[(*key, i)] = item.start_mark.line + 1
            items.append(_plain(item, (*key, i), lines, name))
        return items
    if node is None:
        return None
    try:
        loader = yaml.SafeLoader("")
        return loader.construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        problem = getattr(error, "problem", None) or error
        raise PlanError(f"{name}:{node.start_mark.line + 1}: {problem}") from error


def typed(document: Document, kind: Any, value: Any, key: Key) -> Any:
    """``value`` as a ``kind`` (int, str, bool, a tuple or a dataclass of these), or a PlanError."""
    origin = typing.get_origin(kind)
    if origin is tuple:
        (item, _) = typing.get_args(kind)
        if not isinstance(value, list):
            raise document.error(key, f"{_name(key)} should be a list, not {value!r}")
        return tuple(typed(document, item, v, (*key, i)) for i, v in enumerate(value))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise document.error(key, f"{_name(key)} should be a mapping, not {value!r}")
        kinds = typing.get_type_hints(kind)
        names = [f.name for f in dataclasses.fields(kind)]
        document.only(names, key, value)
        required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
        for name in required:
            if name not in value:
                raise document.error(key, f"{_name(key)} lacks the key {name!r}")
        return kind(
            **{
                name: typed(document, kinds[name], value[name], (*key, name))
                for name in names
                if name in value
            }
        )
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise document.error(key, f"{_name(key)} should be {_WORDS[kind]}, not {value!r}")
    return value


_WORDS = {int: "a whole number", str: "a text", bool: "true or false"}


def _name(key: Key) -> str:
    return "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in key).lstrip(".") or "the plan"
