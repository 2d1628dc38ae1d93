"""What is documented and what the code does are the same."""

import contextlib
import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import jsonschema
import msgspec
import pytest
import yaml

from exporter.cli import parser
from exporter.collectors import COLLECTORS
from exporter.config import Config
from exporter.grammar import ConfigError, decode, json_schema, sections
from exporter.probe.module import JsonAssertion
from exporter.server import Exporter, Settings
from exporter.webconfig import WebConfig

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """Load docs/generate.py."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date(generate: ModuleType) -> None:
    """Every metric, setting, flag and the schema stand in docs/ as the code has them; script/docs writes them anew."""
    differing = [path.name for path, text in generate.pages() if path.read_text() != text]
    assert not differing, "run script/docs"


def test_every_metric_has_one_description(generate: ModuleType) -> None:
    """No two collectors describe one name differently; every description ends as a sentence and names its source."""
    by_name = {}
    for place, descs in generate.catalogue().items():
        for desc in descs:
            assert desc.help.endswith("."), desc.name
            assert desc.source, desc.name
            if place != "probe":
                assert by_name.setdefault(desc.name, desc) == desc


def test_names_keep_prometheus_conventions(generate: ModuleType) -> None:
    """Ours are pm2_*; no label is a target label or changes with every start; no colon in a name."""
    mirrored = ("node_", "probe_", "mongodb_")
    for descs in generate.catalogue().values():
        for desc in descs:
            assert desc.name.startswith(("pm2_", *mirrored)), desc.name
            assert re.fullmatch(r"[a-z_][a-zA-Z0-9_]*", desc.name)
            if not desc.name.startswith(mirrored):
                assert not {
                    "instance",
                    "job",
                    "type",
                    "env",
                    "environment",
                    "service",
                    "cluster",
                    "zone",
                    "region",
                    "pid",
                } & set(desc.labels)


EXAMPLES = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "configuration.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_in_the_documentation_are_valid(example: str) -> None:
    """Every YAML example of configuration.md is read as it stands, and an exporter.yml keeps the JSON Schema."""
    environ = dict.fromkeys(re.findall(r"\$\{(\w+)\}", example), "value")
    if example.startswith("# web.yml"):
        decode(example, WebConfig, file="example", environ=environ)
    elif example.startswith("# prometheus.yml"):
        promtool = ["promtool", "check", "config", "--syntax-only", "/dev/stdin"]
        done = subprocess.run(promtool, input=example, capture_output=True, text=True, check=False)  # noqa: S603
        assert done.returncode == 0, done.stderr
    else:
        decode(re.sub(r"\{file: [^}]*\}", "text", example), Config, file="example", environ=environ)
        jsonschema.Draft202012Validator(json_schema(Config, title="x")).validate(yaml.safe_load(example) or {})


SCHEMA = json_schema(Config, title="x")
ODD = (
    None,
    True,
    0,
    -1,
    7,
    5.5,
    5.0,
    "",
    "x",
    "5s",
    "0",
    "1MB",
    "64 MiB",
    "/x",
    "(",
    "http://x/",
    "GET",
    "ip4",
    "TLS12",
    "gzip",
    "http",
)
ODD += ([], {}, ["x"], [7], {"x": True}, {"x": "x"}, {"x": {}}, {"file": __file__}, [{"url": "x"}], [{"path": "/x"}])


@pytest.mark.parametrize("section", list(sections(Config)), ids=lambda section: section.__name__)
def test_schema_refuses_nothing_that_is_read(section: type[msgspec.Struct]) -> None:
    """Whatever value the exporter takes for a key, an editor that keeps the JSON Schema takes too; each key takes one."""
    schema = SCHEMA["$defs"][section.__name__]
    valid = jsonschema.Draft202012Validator({**schema, "$defs": SCHEMA["$defs"]}).is_valid
    needed = dict.fromkeys(schema.get("required", ()), "/x")
    for key in schema["properties"]:
        read = []
        rest = {"equals": 1} if section is JsonAssertion and key == "path" else {}
        for value in ODD:
            tree = {**needed, **rest, key: value}
            with contextlib.suppress(ConfigError):
                decode(yaml.safe_dump(tree), section, file="x.yml", environ={})
                read.append(tree)
        assert read, f"no value is good enough for {key}"
        assert [tree for tree in read if not valid(tree)] == []


def test_every_endpoint_is_documented() -> None:
    """The table of endpoints names every path that is served, with its methods, and no other."""
    text = (ROOT / "docs" / "configuration.md").read_text()
    served: dict[str, set[str]] = {}
    for route in Exporter(Config, Settings()).app().router.routes():
        assert route.resource
        served.setdefault(route.resource.canonical, set()).add(route.method)
    documented = {
        path: set(methods.split(", ")) for path, methods in re.findall(r"^\| `(/\S*)` \| ([A-Z, ]+) \|", text, re.MULTILINE)
    }
    assert documented == {path: methods - {"HEAD"} for path, methods in served.items()}


def test_every_collector_is_documented(generate: ModuleType) -> None:
    """The table of contents and the documentation name the same collectors."""
    headings = set(re.findall(r"^## `(\w+)`", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE))
    assert set(COLLECTORS) <= headings
    assert set(generate.catalogue()) - {"exporter", "probe"} == set(COLLECTORS)


def test_lock_is_of_this_project() -> None:
    """uv.lock was written for the requirements that pyproject.toml has now, and names no index."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    text = (ROOT / "uv.lock").read_text()
    lock = tomllib.loads(text)
    (own,) = [package for package in lock["package"] if package["name"] == "pm2-selfheal"]

    def locked(entries: list[dict[str, str]]) -> set[str]:
        return {entry["name"] + entry.get("specifier", "") for entry in entries}

    assert locked(own["metadata"]["requires-dist"]) == set(project["project"]["dependencies"])
    for group, requirements in project["dependency-groups"].items():
        assert locked(own["metadata"]["requires-dev"][group]) == set(requirements)
    assert "://" not in text


README = (ROOT / "README.md").read_text()


def test_readme_names_what_there_is() -> None:
    """Every script, page and flag that the README names exists, and its exporter.yml is one."""
    for path in re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r"\bscript/\w+", README):
        assert (ROOT / path).exists(), path
    known = {option for action in parser()._actions for option in action.option_strings}  # noqa: SLF001 -- argparse has no other way
    assert set(re.findall(r"--(?:web|config|log|collector)\.[\w.-]+|--once", README)) <= known
    files = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert len(files) == 2
    decode(re.sub(r"\{file: [^}]*\}", "text", files[1]), Config, file="README", environ={})
