"""Strict YAML to frozen typed values, or one error that names file, line, key and rule.

A configuration type is a `Strict` struct: unknown keys are errors that name the nearest valid key. Four value types beyond
Python's own are written the way people write them: `Duration` ("1m30s"), `Size` ("64MiB"), `Regex` and `Secret` (text that
never shows itself). `${NAME}` in any string is replaced by that environment variable; `$${` is a literal `${`.
"""

import difflib
import errno
import inspect
import math
import os
import re
import stat
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

T = TypeVar("T")


class ConfigError(Exception):
    """A file that people write is wrong; the text says where, which key and which rule."""

    def __init__(self, rule: str, *, file: str, key: str = "", line: int = 0) -> None:
        """Name the broken `rule`, the `key` as a dotted path and the 1-based `line` (0 where there is none)."""
        self.rule, self.file, self.key, self.line = rule, file, key, line
        place = f"{file}:{line}" if line else file
        super().__init__(f"{place}: {key}: {rule}" if key else f"{place}: {rule}")


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """The base of every configuration section: frozen, typed, unknown keys refused."""


_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0, "y": 31536000.0}
_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?(?:ms|[smhdwy]))+")
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|[smhdwy])")


class Duration(float):
    """Seconds; written as Prometheus writes durations: "500ms", "5s", "1m30s", "7d"."""

    __slots__ = ()

    PATTERN = rf"^{_DURATION.pattern}$|^0$"

    @classmethod
    def parse(cls, value: object) -> "Duration":
        """Read "1m30s" or 0; raise ValueError for anything else, above all for a bare number."""
        if value in ("0", 0) and not isinstance(value, bool):
            return cls(0.0)
        if isinstance(value, str) and _DURATION.fullmatch(value):
            seconds = sum(float(number) * _UNITS[unit] for number, unit in _DURATION_PART.findall(value))
            if math.isfinite(seconds):
                return cls(seconds)
        raise ValueError(f"expected a duration with its unit, such as 500ms, 5s or 1m30s, got {value!r}")


_POWERS = {"": 1, "k": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_POWERS |= {"Ki": 1024, "Mi": 1024**2, "Gi": 1024**3, "Ti": 1024**4}
_SIZE = re.compile(r"([0-9]+) ?([kMGT]|[KMGT]i|)B?")


class Size(int):
    """Bytes; written "64MiB" (powers of 1024), "10MB" (powers of 1000) or as a plain count."""

    __slots__ = ()

    PATTERN = rf"^{_SIZE.pattern}$"

    @classmethod
    def parse(cls, value: object) -> "Size":
        """Read "64MiB", "10MB" or 1048576; raise ValueError for anything else."""
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return cls(value)
        match = _SIZE.fullmatch(value) if isinstance(value, str) else None
        if match:
            return cls(int(match[1]) * _POWERS[match[2]])
        raise ValueError(f"expected a size in bytes, such as 1048576, 64MiB or 10MB, got {value!r}")


class Regex(str):
    """A regular expression in the syntax of Python's `re`; "" is none."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: object) -> "Regex":
        """Read an expression; raise ValueError for what is none."""
        try:
            return cls(re.compile(value).pattern)  # type: ignore[call-overload]  # what is no text raises TypeError
        except (re.error, OverflowError, RecursionError, TypeError) as error:
            raise ValueError(f"expected a regular expression: {error}") from None


class Secret:
    """Text that never shows itself: `reveal()` is the only way to read it."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        """Keep `text`."""
        self._text = text

    def reveal(self) -> str:
        """Return the text itself, for the one call that needs it."""
        return self._text

    def __repr__(self) -> str:
        return "<secret>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    @classmethod
    def parse(cls, value: object) -> "Secret":
        """Read text itself or {file: PATH}; raise ValueError, without the text, for anything else."""
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, dict) and list(value) == ["file"] and isinstance(value["file"], str):
            try:
                return cls(read_file(os.path.expanduser(value["file"]), FILE_MAX).decode().strip())  # noqa: PTH111 -- Path's raises
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", "not UTF-8 text, or not a path")
                raise ValueError(f"cannot read the secret file {value['file']!r}: {reason}") from None
        raise ValueError('expected text, "${ENVIRONMENT_VARIABLE}" or {file: PATH}')


_WRITTEN: dict[type, Any] = {Duration: Duration.parse, Size: Size.parse, Regex: Regex.parse, Secret: Secret.parse}
_SCHEMAS: dict[type, dict[str, Any]] = {
    Duration: {
        "anyOf": [{"type": "string", "pattern": Duration.PATTERN}, {"const": 0}],
        "description": 'A duration with its unit, such as "500ms", "5s" or "1m30s".',
    },
    Size: {
        "anyOf": [{"type": "string", "pattern": Size.PATTERN}, {"type": "integer", "minimum": 0}],
        "description": 'Bytes: a count, or such as "64MiB" or "10MB".',
    },
    Regex: {"type": "string", "description": "A regular expression in the syntax of Python's re; empty for none."},
    Secret: {
        "anyOf": [
            {"type": "string"},
            {
                "type": "object",
                "properties": {"file": {"type": "string"}},
                "required": ["file"],
                "additionalProperties": False,
            },
        ],
        "description": "Text, an environment variable as ${NAME}, or {file: PATH}.",
    },
}


def _decode_hook(kind: type, value: object) -> object:
    if kind in _WRITTEN:
        return _WRITTEN[kind](value)
    raise NotImplementedError(kind)


def default(value: T) -> T:
    """Return the default of a field; for the value types above and for sections, which JSON Schema cannot write itself."""
    return msgspec.field(default_factory=lambda: value)


def written(value: object) -> object:
    """Return `value` as a person would write it in YAML: durations and sizes with their units, sections as mappings."""
    match value:
        case Duration():
            return "0" if not value else _with_unit(value, _UNITS, "s")
        case Size():
            return _with_unit(value, {f"{unit}B": power for unit, power in _POWERS.items() if "i" in unit}, "")
        case Regex():
            return str(value)
        case Secret():
            return repr(value)
        case msgspec.Struct():
            return {name: written(getattr(value, name)) for name in value.__struct_fields__}
        case tuple() | list():
            return [written(item) for item in value]
        case dict():
            return {key: written(item) for key, item in value.items()}
        case _:
            return value


def _with_unit(value: float, units: Mapping[str, float], otherwise: str) -> object:
    for unit, size in sorted(units.items(), key=lambda item: -item[1]):
        if value and value % size == 0 and unit not in {"w", "y"}:
            return f"{value // size:.0f}{unit}"
    return f"{value:.15g}{otherwise}" if otherwise else int(value)


def json_schema(kind: type[msgspec.Struct], *, title: str) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a configuration type, for editors."""
    (root,), components = msgspec.json.schema_components([kind], schema_hook=lambda inner: dict(_SCHEMAS[inner]))
    for struct in sections(kind):
        # From Python 3.13 on docstrings come without their indentation.
        components[struct.__name__]["description"] = inspect.cleandoc(struct.__doc__ or "")
        properties = components[struct.__name__]["properties"]
        for field in msgspec.structs.fields(struct):
            if field.default_factory is not msgspec.NODEFAULT:
                properties[field.encode_name]["default"] = written(field.default_factory())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **root, "$defs": components}


def sections(kind: Any) -> Iterator[type[msgspec.Struct]]:  # noqa: ANN401 -- any annotation
    """Yield every struct that `kind` is made of, itself first, each once."""
    seen: dict[type[msgspec.Struct], None] = {}
    waiting = [kind]
    while waiting:
        inner = waiting.pop(0)
        if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            if inner not in seen:
                seen[inner] = None
                waiting += [field.type for field in msgspec.structs.fields(inner)]
        else:
            waiting += typing.get_args(inner)
    yield from seen


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses what YAML would silently make something else of, without repeating what may be a secret."""

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:  # noqa: ANN401 -- PyYAML's signature
        try:
            return super().compose_node(parent, index)
        except yaml.composer.ComposerError as error:
            if "undefined alias" in (error.problem or ""):
                raise _wrong(
                    "there is no such anchor; text that starts with * goes in quotes", error.problem_mark
                ) from None
            raise

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # noqa: ANN401 -- PyYAML's signature
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _wrong("a key must be plain text", key.start_mark)
            kind = key.tag.rpartition(":")[2]
            if kind not in ("str", "merge", "value"):
                raise _wrong(f"the key {key.value!r} is read as {kind}, not as text; it goes in quotes", key.start_mark)
            if key.value in seen:
                raise _wrong(f"the key {key.value!r} is written twice", key.start_mark)
            seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: ANN401, FBT001, FBT002 -- PyYAML's signature
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError):
            raise _wrong(
                f"a value that is no {node.tag.rpartition(':')[2]}; text goes in quotes", node.start_mark
            ) from None


def _wrong(rule: str, mark: yaml.Mark | None) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=rule, problem_mark=mark)


def _unknown_tag(_: _StrictLoader, node: yaml.Node) -> None:
    raise _wrong("a tag that is not known; text that starts with ! goes in quotes", node.start_mark)


_StrictLoader.add_constructor(None, _unknown_tag)

FILE_MAX = 1024**2
"""Bytes; a longer configuration or secret file is refused."""
VALUES_MAX = 100_000
"""Values in a file, each counted as often as aliases repeat it: a few lines of aliases can stand for billions."""


def read_file(path: str | Path, limit: int) -> bytes:
    """Return what is in a regular file of at most `limit` bytes; raise OSError, and never wait for a pipe's writer."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123 -- of a descriptor
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        found = file.read(limit + 1)
    if len(found) > limit:
        raise OSError(errno.EFBIG, f"longer than {limit} bytes")
    return found


def load(path: str | Path, kind: type[T], *, environ: Mapping[str, str]) -> T:
    """Read the YAML file at `path` as a `kind`; raise ConfigError for whatever is wrong with it."""
    try:
        text = read_file(path, FILE_MAX).decode()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 text (byte {error.start})", file=str(path)) from None
    return decode(text, kind, file=str(path), environ=environ)


def decode(text: str, kind: type[T], *, file: str, environ: Mapping[str, str]) -> T:
    """Read YAML `text` as a `kind`; `file` is what errors call it. An empty text means every default."""
    node, tree = _parse(text, file)
    try:
        tree = _substitute({} if tree is None else tree, environ)
        return msgspec.convert(tree, kind, dec_hook=_decode_hook)
    except _VariableError as error:
        raise ConfigError(error.rule, file=file, key=_dotted(error.path), line=_line(node, error.path)) from None
    except RecursionError:
        raise ConfigError("is nested too deeply", file=file) from None
    except msgspec.ValidationError as error:
        rule, path = _read_message(str(error), kind, tree)
        if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", rule, re.DOTALL):
            path = (*path, unknown[1])
            rule = "unknown key" + _nearest(unknown[1], kind, path[:-1])
        elif missing := re.fullmatch(r"Object missing required field `(.*)`", rule):
            rule = f"the key {missing[1]!r} is required"
        else:
            rule, path = _key_in_rule(rule, kind, path)
        rule = rule.replace("`object`", "a mapping").replace("`array`", "a list").replace("`str`", "text")
        raise ConfigError(rule, file=file, key=_dotted(path), line=_line(node, path)) from None


def _parse(text: str, file: str) -> tuple[yaml.Node | None, Any]:
    """Return the document as nodes, which know their lines, and as values."""
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        if _expanded(node, {}) > VALUES_MAX:
            raise _wrong(f"it stands for more than {VALUES_MAX} values", node.start_mark)
        return node, loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        problem = (error.problem or error.context or "").partition(" '!")[0]
        raise ConfigError(f"is not valid YAML: {problem}", file=file, line=line) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"is not valid YAML: {str(error).splitlines()[0]}", file=file) from None
    except RecursionError:
        raise ConfigError("is not valid YAML: it is nested too deeply", file=file) from None


def _expanded(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """Return how many values `node` is, with every alias written out."""
    if node not in known:
        known[node] = 0
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[node] = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_expanded(part, known) for part in inner))
    elif not known[node]:
        raise _wrong("an alias stands for what it is a part of", node.start_mark)
    return known[node]


class _VariableError(Exception):
    def __init__(self, rule: str, path: tuple[str | int, ...]) -> None:
        self.rule, self.path = rule, path


_VARIABLE = re.compile(r"\$(\$\{)|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)\})?")


def _substitute(tree: object, environ: Mapping[str, str], path: tuple[str | int, ...] = ()) -> Any:  # noqa: ANN401 -- any YAML
    if isinstance(tree, dict):
        return {key: _substitute(value, environ, (*path, key)) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_substitute(value, environ, (*path, index)) for index, value in enumerate(tree)]
    if not isinstance(tree, str) or "${" not in tree:
        return tree

    def replace(match: re.Match[str]) -> str:
        if match[1]:
            return match[1]
        if not match[2]:
            raise _VariableError("after ${ comes the name of an environment variable and }; ${ itself is $${", path)
        if match[2] not in environ:
            raise _VariableError(f"the environment variable {match[2]} is not set", path)
        return environ[match[2]]

    return _VARIABLE.sub(replace, tree)


_STEP = re.compile(r"\.([^.\[\]`]+)|\[(\d+|\.\.\.)\]")


def _read_message(message: str, kind: type, tree: object) -> tuple[str, tuple[str | int, ...]]:
    """Split msgspec's "rule - at `$.a[...].b[0]`" into the rule and the path, with the key that `[...]` stands for."""
    rule, _, place = message.rpartition(" - at `$")
    if not rule:
        return message, ()
    path: tuple[str | int, ...] = ()
    for step in _STEP.finditer(place.rstrip("`")):
        if step[2] == "...":
            path = (*path, _culprit(_types_at(kind, path), tree))
        else:
            path = (*path, int(step[2]) if step[2] else step[1])
        try:
            tree = tree[path[-1]]  # type: ignore[index]
        except (LookupError, TypeError):
            tree = None
    return rule, path


_KEY_FIRST = re.compile(r"(\w+)((?:\[\d+\]|\.\w+)*)(?:: | (?=must |is ))")


def _key_in_rule(rule: str, kind: type, path: tuple[str | int, ...]) -> tuple[str, tuple[str | int, ...]]:
    """Move the key that a section's own rule begins with, as in "timeout must be …" or "targets[0].url: …", to the path."""
    found = _KEY_FIRST.match(rule)
    if not found or not any(found[1] in getattr(here, "__struct_encode_fields__", ()) for here in _types_at(kind, path)):
        return rule, path
    below = [int(step[2]) if step[2] else step[1] for step in _STEP.finditer(found[2])]
    return rule[found.end() :], (*path, found[1], *below)


def _culprit(kinds: list[Any], tree: object) -> str:
    """Return the key of the mapping `tree` that is not as one of `kinds` wants it."""
    for kind in kinds:
        if typing.get_origin(kind) is dict and isinstance(tree, dict):
            for key, value in tree.items():
                try:
                    msgspec.convert({key: value}, kind, dec_hook=_decode_hook)
                except msgspec.ValidationError:
                    return str(key)
    return "*"


def _dotted(path: tuple[str | int, ...]) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


def _line(node: yaml.Node | None, path: tuple[str | int, ...]) -> int:
    """Return the 1-based line that `path` leads to, or of the last step that exists."""
    if node is None:
        return 0
    line: int = node.start_mark.line + 1
    for step in path:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(step)]
            if not found:
                return line
            key, node = found[-1]  # what a merge brings stands before
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
    return line


def _nearest(key: str, kind: type, path: tuple[str | int, ...]) -> str:
    """Say which valid key the writer may have meant, or which there are."""
    structs = [found for found in _types_at(kind, path) if isinstance(found, type) and issubclass(found, msgspec.Struct)]
    valid = sorted({name for struct in structs for name in struct.__struct_encode_fields__})
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; the keys here are: {', '.join(valid)}" if valid else ""


def _types_at(kind: Any, path: tuple[str | int, ...]) -> list[Any]:  # noqa: ANN401 -- any annotation
    """Return what may stand at `path` in a `kind`, unions taken apart."""
    kinds = _alternatives(kind)
    for step in path:
        kinds = [found for outer in kinds for inner in _inside(outer, step) for found in _alternatives(inner)]
    return kinds


def _alternatives(kind: Any) -> list[Any]:  # noqa: ANN401 -- any annotation
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        return _alternatives(typing.get_args(kind)[0])
    if origin in (typing.Union, types.UnionType):
        return [found for inner in typing.get_args(kind) for found in _alternatives(inner)]
    return [kind]


def _inside(kind: Any, step: str | int) -> list[Any]:  # noqa: ANN401 -- any annotation
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return [field.type for field in msgspec.structs.fields(kind) if field.encode_name == step]
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is dict:
        return [arguments[1]]
    return [arguments[0]] if arguments else []
