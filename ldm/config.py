"""Strict typed configuration: frozen dataclasses, YAML files and `--set a.b=c`.

The dataclasses live beside the classes they describe and inherit `Config`. This is the only module that reads
YAML and the only one that knows pydantic.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

C = TypeVar("C", bound="Config")


class UserError(Exception):
    """An error whose message is for the user: what, where, why and what to do next. The CLI prints it bare."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ConfigError(UserError):
    """A configuration that cannot be used; the message lists every fault with its dotted path."""


class Config:
    """Base of every configuration dataclass: unknown keys are refused, nothing is coerced in silence."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", arbitrary_types_allowed=False)


def tagged(key: str = "kind") -> Any:
    """Mark a union of config dataclasses as told apart by the literal field `key`."""
    return Field(discriminator=key)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and anchors; YAML tags for objects were never in it."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not supported", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is not text (quote it)", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key!r}", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 -- a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise ConfigError(f"{where}:{line}: {error.problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{where}: not readable as YAML: {error}") from None


def _apply_override(data: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise ConfigError(f"--set {override}: expected a.b=value")
    node: Any = data
    for key in keys[:-1]:
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {key} is a value, not a section")
    node[keys[-1]] = _parse_yaml(text, f"--set {path}")


def _sections(annotation: Any) -> list[type]:
    """The config classes an annotation can hold (through unions, Annotated and tuples)."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return [annotation]
    if get_origin(annotation) in (Annotated, Union, types.UnionType, tuple, dict):
        return [c for a in get_args(annotation) if not isinstance(a, str) for c in _sections(a)]
    return []


def _known_keys(root: Any, location: Sequence[Any]) -> list[str]:
    """The keys allowed beside the last element of `location`, for a did-you-mean."""
    candidates = _sections(root)
    for part in location[:-1]:
        narrowed = [c for c in candidates if part in {f.name for f in dataclasses.fields(c)}]
        if narrowed:
            candidates = [s for c in narrowed for s in _sections(get_type_hints(c, include_extras=True)[part])]
    return sorted({f.name for c in candidates for f in dataclasses.fields(c)})


def _explain(root: Any, error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors():
        location = [p for p in item["loc"] if not (isinstance(p, str) and p.startswith("function-"))]
        path = ".".join(str(p) for p in location) or "(top level)"
        if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = _known_keys(root, location)
            close = difflib.get_close_matches(str(location[-1]), known, 1)
            hint = f"did you mean {close[0]}?" if close else f"allowed here: {', '.join(known)}"
            lines.append(f"{path}: unknown key; {hint}")
        elif item["type"] == "missing_argument":
            lines.append(f"{path}: missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            shown = f" (got {item['input']!r:.80})" if not isinstance(item["input"], dict) else ""
            lines.append(f"{path}: {message}{shown}")
    return lines


def parse(kind: Any, data: Any, where: str) -> Any:
    """Validate plain data as `kind`, a config dataclass or a tagged union of them.

    Raises ConfigError that lists all faults at once, each with its dotted path.
    """
    if not isinstance(data, dict):
        found = "nothing" if data is None else type(data).__name__
        raise ConfigError(f"{where}: expected sections (key: value) at the top, found {found}")
    try:
        return TypeAdapter(kind).validate_python(_tuples(data))
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {line}" for line in _explain(kind, error))) from None


def load(kind: Any, path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Read a YAML file as `kind` after applying `a.b=value` overrides.

    Raises ConfigError when the file is missing, is not YAML or does not fit `kind`.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    data = _parse_yaml(text, str(path))
    if data is None:
        raise ConfigError(f"{path}: the file is empty")
    if isinstance(data, dict):
        for override in overrides:
            _apply_override(data, override)
    return parse(kind, data, str(path))


def to_dict(config: Config) -> dict[str, Any]:
    """The plain data of a config, as `parse` reads it back."""
    return dataclasses.asdict(config)  # type: ignore[call-overload,no-any-return]


def to_yaml(config: Config) -> str:
    """The resolved config as YAML text that `load` reads back to an equal config."""
    return yaml.safe_dump(_plain(to_dict(config)), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _tuples(value: Any) -> Any:
    """Lists become tuples, so that frozen configs stay hashable, and PyYAML's text `1e-4` stays for pydantic."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(v) for v in value)
    return value
