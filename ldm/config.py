"""Strict typed configuration: frozen dataclasses, YAML files and `--set a.b=c`.

The dataclasses live beside the classes they describe and inherit `Config`. This is the only module that reads
YAML and the only one that knows pydantic.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

# YAML 1.2's scalars. PyYAML's own follow 1.1, where `no` is false, `1e-4` is text and `010` is eight.
_SCALARS = {
    "null": (r"~|null|", ["~", "n", ""]),
    "bool": (r"true|false", list("tf")),
    "int": (r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    "float": (r"[-+]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
}
_MESSAGES = {
    "missing": "missing",
    "json_invalid": "nested too deeply, or text with broken characters",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text; put it in quotes",
    "tuple_type": "must be a list",
    "too_long": "has too many entries",
    "dataclass_type": "must be a section of keys and values",
}
_BARE = ("missing", "json_invalid")  # errors that come with the value around them, not their own


class UserError(Exception):
    """An error whose message is for the user: what, where, why and what to do next. The CLI prints it bare."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ConfigError(UserError):
    """A configuration that cannot be used; the message lists every fault with its dotted path."""


class Config:
    """Base of every configuration dataclass: unknown keys are refused, nothing is coerced in silence."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def tagged(key: str = "kind") -> Any:
    """Mark a union of config dataclasses as told apart by the literal field `key`."""
    return Field(discriminator=key)


class _Loader(yaml.SafeLoader):
    """SafeLoader of YAML 1.2's plain types only: refuses duplicate keys, aliases and every other tag."""

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

    def refuse_tag(self, node: Any) -> None:
        raise yaml.constructor.ConstructorError(None, None, f"tag {node.tag} is not supported", node.start_mark)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes text which `_Loader`, unlike PyYAML, reads as a number."""


_Loader.yaml_implicit_resolvers = {}
_Loader.yaml_constructors = {
    f"tag:yaml.org,2002:{name}": yaml.SafeLoader.yaml_constructors[f"tag:yaml.org,2002:{name}"]
    for name in (*_SCALARS, "str", "seq", "map")
}
_Loader.add_constructor(None, _Loader.refuse_tag)
for _kind, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"({_pattern})$"), _first)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise ConfigError(f"{where}:{line}: {error.problem}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply") from None
    except (yaml.YAMLError, ValueError, KeyError) as error:
        raise ConfigError(f"{where}: not readable as YAML: {error}") from None


def apply_override(data: dict[str, Any], override: str) -> str:
    """Put `a.b=value` into the data; returns the path a.b."""
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
    return path


def _sections(annotation: Any) -> list[type]:
    """The config classes an annotation can hold (through unions, Annotated and tuples)."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return [annotation]
    if get_origin(annotation) in (Annotated, Union, types.UnionType, tuple, dict):
        return [c for a in get_args(annotation) if not isinstance(a, str) for c in _sections(a)]
    return []


def _fields(section: type) -> dict[str, Any]:
    """The keys of a config class with their annotations."""
    hints = get_type_hints(section, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(section)}


def _place(root: Any, location: Sequence[Any]) -> tuple[list[str], list[str], list[str]]:
    """Of pydantic's location: its dotted parts in the file, the keys allowed beside the last, and those below."""
    path: list[str] = []
    beside: list[str] = []
    sections = _sections(root)
    for part in location:
        members = [s for s in sections if part in get_args(_fields(s).get("kind"))]
        if len(sections) > 1 and members:
            sections = members  # the tag of a union's member, which the file does not have there
            continue
        path.append(str(part))
        if isinstance(part, str):
            fields = [_fields(s) for s in sections]
            beside = sorted({name for f in fields for name in f})
            sections = [s for f in fields if part in f for s in _sections(f[part])]
    return path, beside, sorted({name for s in sections for name in _fields(s)})


def _explain(root: Any, item: Any) -> tuple[str, str]:
    """The dotted path of one of pydantic's errors and what is wrong there, in the file's words."""
    path, beside, below = _place(root, item["loc"])
    kind, context = item["type"], item.get("ctx", {})
    shown = f" (got {item['input']!r:.80})" if not isinstance(item["input"], dict) else ""
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        close = difflib.get_close_matches(path[-1], beside, 1)
        hint = f"did you mean {close[0]}?" if close else f"allowed here: {', '.join(beside)}"
        message = f"unknown key; {hint}"
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        path.append("kind")
        tags = sorted(str(tag) for s in _sections(root) for tag in get_args(_fields(s).get("kind")))
        got = f" (got {context['tag']!r:.80})" if "tag" in context else ""
        message = f"must be one of {', '.join(tags)}{got}" if got else f"missing; one of {', '.join(tags)}"
    elif kind == "literal_error":
        message = f"must be {context['expected']}{shown}"
    elif kind == "value_error":
        message = item["msg"].removeprefix("Value error, ")
        subject = message.split()[0].rstrip(":,")
        path += subject.split(".") if subject.partition(".")[0] in below else []
    else:
        message = _MESSAGES.get(kind, "cannot be used") + (shown if kind not in _BARE else "")
    return ".".join(path), message


def _require_sections(data: Any, where: str) -> None:
    if not isinstance(data, dict):
        found = "nothing" if data is None else type(data).__name__
        raise ConfigError(f"{where}: expected sections (key: value) at the top, found {found}")


def parse(kind: Any, data: Any, where: str, spots: Mapping[str, str] | None = None) -> Any:
    """Validate plain data as `kind`, a config dataclass or a tagged union of them.

    spots: the place of each dotted path, for messages; `where` is that of the rest.
    Raises ConfigError that lists all faults at once, each with its dotted path.
    """
    _require_sections(data, where)
    try:
        # of pydantic's strict modes, only that for JSON takes sections and lists for what they stand for
        return TypeAdapter(kind).validate_json(json.dumps(data))
    except ValidationError as error:
        faults = [_explain(kind, item) for item in error.errors()]
    except RecursionError:
        faults = [("", "nested too deeply")]
    lines = [f"{_spot(path, spots or {}, where)}: {path or 'top level'}: {message}" for path, message in faults]
    raise ConfigError("\n".join(lines))


def _spot(path: str, spots: Mapping[str, str], where: str) -> str:
    while path and path not in spots:
        path = path.rpartition(".")[0]
    return spots[path] if path else where


def _spots(node: Any, where: str, prefix: str = "") -> dict[str, str]:
    """Dotted path -> file:line of every key below a YAML node."""
    found: dict[str, str] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        found[prefix + key.value] = f"{where}:{key.start_mark.line + 1}"
        found |= _spots(value, where, f"{prefix}{key.value}.")
    return found


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
    _require_sections(data, f"{path}:1")
    spots = _spots(yaml.compose(text, Loader=_Loader), str(path))
    for override in overrides:
        changed = apply_override(data, override)
        spots[changed] = f"--set {changed}"
    return parse(kind, data, str(path), spots)


def to_dict(config: Config) -> dict[str, Any]:
    """The plain data of a config, as `parse` reads it back."""
    return dataclasses.asdict(config)  # type: ignore[call-overload]


def to_yaml(config: Config) -> str:
    """The resolved config as YAML text that `load` reads back to an equal config."""
    return yaml.dump(_plain(to_dict(config)), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
