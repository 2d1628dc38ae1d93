"""Writes the tables of metrics.md and configuration.md, and exporter.schema.json, from the code that they describe.

Text outside the markers is written by hand. `script/docs` runs this; `script/docs --check` changes nothing and tells what
differs.
"""

import argparse
import ast
import importlib
import inspect
import json
import re
import sys
import textwrap
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from exporter import exposition, server, webconfig
from exporter.cli import parser
from exporter.collectors import COLLECTORS
from exporter.collectors.http import PROBE_DESCS
from exporter.config import Config
from exporter.exposition import Desc
from exporter.grammar import json_schema, sections, written

DOCS = Path(__file__).parent


def catalogue() -> dict[str, tuple[Desc, ...]]:
    """Return every metric the exporter can serve, by where it comes from."""
    collectors = {name: importlib.import_module(f"exporter.collectors.{name}").DESCS for name in COLLECTORS}
    return {**collectors, "exporter": (*server.DESCS, exposition.DROPPED), "probe": PROBE_DESCS}


def metrics_table(descs: Iterable[Desc]) -> str:
    """Return the table of some metrics."""
    rows = ["| Metric | Type | Labels | Meaning | Source |", "|---|---|---|---|---|"]
    for desc in descs:
        labels = ", ".join(f"`{label}`" for label in desc.labels) or "-"
        rows.append(f"| `{desc.name}` | {desc.kind.value} | {labels} | {_cell(desc.help)} | {_cell(desc.source) or '-'} |")
    return "\n".join(rows)


def settings_tables(kind: type[msgspec.Struct]) -> str:
    """Return a table of every section of a configuration type, the whole first."""
    return "\n\n".join(_settings_table(section) for section in sections(kind))


def _settings_table(section: type[msgspec.Struct]) -> str:
    texts = field_docstrings(section)
    rows = [f"### {section.__name__}", "", inspect.cleandoc(section.__doc__ or ""), ""]
    rows += ["| Key | Value | Default | Meaning |", "|---|---|---|---|"]
    for field in msgspec.structs.fields(section):
        rows.append(f"| `{field.encode_name}` | {_type(field.type)} | {_default(field)} | {_cell(texts[field.name])} |")
    return "\n".join(rows)


def field_docstrings(section: type[msgspec.Struct]) -> dict[str, str]:
    """Return the docstring that stands below each field; raise KeyError, naming it, for a field without one."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(tree, ast.ClassDef)  # noqa: S101 -- what a class's source is
    found = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match text:
                case ast.Expr(value=ast.Constant(value=str(docstring))):
                    found[field.target.id] = docstring
    missing = set(section.__struct_fields__) - set(found)
    if missing:
        raise KeyError(f"{section.__name__}: no docstring below {', '.join(sorted(missing))}")
    return found


def flags_table() -> str:
    """Return the table of the command line's flags."""
    rows = ["| Flag | Meaning |", "|---|---|"]
    for action in parser()._actions:  # noqa: SLF001 -- argparse has no other way to list them
        value = f"={action.metavar or '|'.join(action.choices or ())}" if action.nargs != 0 else ""
        names = ", ".join(f"`{name}{value}`" for name in action.option_strings).replace("|", "\\|")
        rows.append(f"| {names} | {_cell(action.help or '')} |")
    return "\n".join(rows)


def _type(kind: object) -> str:
    if kind is type(None):
        return "nothing"
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"{_type(arguments[0])} → {_type(arguments[1])}"
    if origin is not None:
        return " or ".join(_type(inner) for inner in arguments if inner is not type(None))
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    names = {
        "str": "text",
        "int": "number",
        "float": "number",
        "bool": "true or false",
        "Duration": "duration",
        "Size": "bytes",
        "Regex": "regular expression",
    }
    name = getattr(kind, "__name__", str(kind))
    return names.get(name, name.lower())


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    value = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    if value is None or value in ((), {}, [], "") or isinstance(value, msgspec.Struct):
        return "-"
    return f"`{_cell(json.dumps(written(value), ensure_ascii=False))}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def pages() -> Iterator[tuple[Path, str]]:
    """Yield every file that is generated, wholly or in parts, with what should stand in it."""
    metrics = {name: metrics_table(descs) for name, descs in catalogue().items()}
    settings = {"exporter.yml": settings_tables(Config), "web": settings_tables(webconfig.WebConfig)}
    flags = {"flags": flags_table()}
    yield DOCS / "metrics.md", _fill(DOCS / "metrics.md", metrics)
    yield DOCS / "configuration.md", _fill(DOCS / "configuration.md", settings | flags)
    schema = json_schema(Config, title="exporter.yml of pm2-exporter")
    yield DOCS / "exporter.schema.json", json.dumps(schema, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


_MARKED = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _fill(path: Path, parts: dict[str, str]) -> str:
    text = path.read_text(encoding="utf-8")
    if missing := set(parts) - {match[2] for match in _MARKED.finditer(text)}:
        raise KeyError(f"{path.name}: no place marked for {', '.join(sorted(missing))}")
    return _MARKED.sub(lambda match: match[1] + parts[match[2]] + "\n" + match[3], text)


def main() -> int:
    """Write, or check; return the exit code."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--check", action="store_true", help="change nothing, exit 1 when something differs")
    check = flags.parse_args().check
    differing = [(path, text) for path, text in pages() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path, text in differing:
        print(("differs: " if check else "written: ") + path.name)
        if not check:
            path.write_text(text, encoding="utf-8")
    return 1 if check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
