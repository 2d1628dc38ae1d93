"""Strict YAML: what is right becomes typed values, what is wrong becomes one error that names file, line, key and rule."""

import os
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.grammar import (
    FILE_MAX,
    ConfigError,
    Duration,
    Regex,
    Secret,
    Size,
    Strict,
    decode,
    default,
    json_schema,
    load,
    written,
)


class Inner(Strict, frozen=True, kw_only=True):
    """A section."""

    home: str = "~"
    timeout: Duration = default(Duration(3))
    limits: tuple[Size, ...] = ()
    password: Secret | None = None
    only: Regex = default(Regex())

    def __post_init__(self) -> None:
        """Hold rules that name their key."""
        if self.timeout > 3600:
            raise ValueError("timeout must be at most 1h")
        for index, limit in enumerate(self.limits):
            if limit == 13:
                raise ValueError(f"limits[{index}]: 13 brings bad luck")
        if self.home == "nowhere":
            raise ValueError("home and timeout do not fit together")


class Outer(Strict, frozen=True, kw_only=True):
    """A file."""

    inner: Inner = default(Inner())
    named: dict[str, Inner] = default({})
    listed: tuple[Inner, ...] = ()
    flags: dict[str, bool] = default({})


def read(text: str, **environ: str) -> Outer:
    """Read `text` as a file called x.yml."""
    return decode(text, Outer, file="x.yml", environ=environ)


BAD = [
    ("inner: {hoem: x}", "x.yml:1: inner.hoem: unknown key; did you mean 'home'?"),
    ("zzz: 1", "x.yml:1: zzz: unknown key; the keys here are: flags, inner, listed, named"),
    ("inner:\n  home: 5", "x.yml:2: inner.home: Expected text, got `int`"),
    ("inner: 4", "x.yml:1: inner: Expected a mapping, got `int`"),
    ("- 1", "x.yml:1: Expected a mapping, got a list"),
    ("inner:\n\n  timeout: 5", "expected a duration with its unit, such as 500ms, 5s or 1m30s, got 5"),
    ("inner: {timeout: -1s}", "expected a duration"),
    ("inner: {timeout: true}", "expected a duration"),
    ("inner: {limits: [1MB, 1 potato]}", "x.yml:1: inner.limits[1]: expected a size in bytes"),
    ("inner:\n  home: a\n  home: b", "x.yml:3: is not valid YAML: the key 'home' is written twice"),
    ("named:\n  a: {}\n  b.c[0]:\n    hom: x", "x.yml:4: named.b.c[0].hom: unknown key; did you mean 'home'?"),
    ("listed:\n- {}\n- home: []", "x.yml:3: listed[1].home: Expected text, got a list"),
    ("flags:\n  a: true\n  b: maybe", "x.yml:3: flags.b: Expected `bool`, got text"),
    ("inner: {home: '${NOPE}'}", "x.yml:1: inner.home: the environment variable NOPE is not set"),
    ("inner: {password: {file: /does/not/exist}}", "cannot read the secret file '/does/not/exist': No such file"),
    ("inner: {password: {fiel: x}}", 'expected text, "${ENVIRONMENT_VARIABLE}" or {file: PATH}'),
    ("inner: [", "x.yml:1: is not valid YAML"),
    ("? [1]\n: 2", "a key must be plain text"),
    ("inner: !!python/object:os.system {}", "x.yml:1: is not valid YAML: a tag that is not known"),
    ("[" * 5000, "is not valid YAML: it is nested too deeply"),
    ("inner:\n  home: x\n  timeout: 2h", "x.yml:3: inner.timeout: must be at most 1h"),
    ("inner:\n  limits:\n  - 1\n  - 13", "x.yml:4: inner.limits[1]: 13 brings bad luck"),
    ("inner:\n  home: nowhere", "x.yml:1: inner: home and timeout do not fit together"),
    ("inner:\n  only: '('", "x.yml:2: inner.only: expected a regular expression: missing )"),
    ("inner: {only: 'a{99999999999}'}", "inner.only: expected a regular expression: the repetition number is too large"),
    ("inner: {only: 5}", "inner.only: expected a regular expression"),
    ("inner: {timeout: %sy}" % ("9" * 400), "expected a duration"),
    ("inner: {timeout: ٣s}", "expected a duration"),
    ("inner: {limits: [٣]}", "expected a size in bytes"),
    ("named:\n  123: {}", "x.yml:2: is not valid YAML: the key '123' is read as int, not as text; it goes in quotes"),
    ("named: {no: {}}", "the key 'no' is read as bool, not as text; it goes in quotes"),
    ("named:\n  a: &a {home: x}\n  b: {<<: *a, hom: y}", "x.yml:3: named.b.hom: unknown key; did you mean 'home'?"),
    ("inner: {home: '${NOPE:-x}'}", "x.yml:1: inner.home: after ${ comes the name of an environment variable and }"),
    ("inner: {home: '${NOPE'}", "x.yml:1: inner.home: after ${ comes the name of an environment variable and }"),
    ("flags:\n  a: !!bool maybe", "x.yml:2: is not valid YAML: a value that is no bool"),
    ("flags: {a: !!int ''}", "x.yml:1: is not valid YAML: a value that is no int"),
    ("inner:\n  home: 2024-99-99", "x.yml:2: is not valid YAML: a value that is no timestamp; text goes in quotes"),
    ("inner: &a {home: *a}", "x.yml:1: is not valid YAML: an alias stands for what it is a part of"),
    ("inner: {password: {file: ~nobody-of-that-name/x}}", "cannot read the secret file '~nobody-of-that-name/x': No such"),
    ('inner: {password: {file: "a\\0b"}}', "inner.password: cannot read the secret file"),
    ("a: \x00", "is not valid YAML"),
]


@pytest.mark.parametrize(("text", "error"), BAD, ids=[error[:50] for _, error in BAD])
def test_bad_file(text: str, error: str) -> None:
    """Every mistake has one pinned error."""
    with pytest.raises(ConfigError) as failure:
        read(text)
    assert error in str(failure.value)


def test_good_file() -> None:
    """Everything that people write is read as the value it means."""
    read_back = read(
        """
        inner: {timeout: 1m30s, limits: [64MiB, 10MB, 7, 2 KiB], home: "${HOME}/x $${HOME}"}
        listed: [{timeout: 500ms}, {timeout: 0}]
        """,
        HOME="/home/me",
    )
    assert read_back.inner == Inner(
        timeout=Duration(90), limits=(Size(2**26), Size(10**7), Size(7), Size(2048)), home="/home/me/x ${HOME}"
    )
    assert [item.timeout for item in read_back.listed] == [0.5, 0]


def test_merged_mappings() -> None:
    """What a mapping says itself wins over what it merges, as YAML has it."""
    named = read("named: {a: &a {home: x, timeout: 1s}, b: {<<: *a, timeout: 2s}, c: {<<: [{home: y}, *a]}}").named
    assert named["b"] == Inner(home="x", timeout=Duration(2))
    assert named["c"] == Inner(home="y", timeout=Duration(1))


@pytest.mark.parametrize(("first", "again"), [("[x,x]", "[%s]"), ("{k: x}", "{<<: [%s]}")], ids=["lists", "merges"])
def test_a_few_aliases_cannot_stand_for_millions_of_values(first: str, again: str) -> None:
    """A file of half a kilobyte does not become gigabytes."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{level}: &a{level} " + again % ",".join([f"*a{level - 1}"] * 9) for level in range(1, 9)]
    with pytest.raises(ConfigError, match="x.yml:1: is not valid YAML: it stands for more than 100000 values"):
        read("\n".join(lines))


@pytest.mark.parametrize("written", ["!hunter2", "!hunter2!x", "*hunter2", "@hunter2", "%hunter2", "'hunter2' x"])
def test_a_secret_that_is_no_yaml_is_not_in_the_error(written: str) -> None:
    """A password that would have needed quotes is an error that does not repeat it."""
    with pytest.raises(ConfigError, match="x.yml:2: is not valid YAML") as failure:
        read(f"inner:\n  password: {written}\n")
    assert "hunter2" not in str(failure.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    """A pipe is not waited for, and no file is read without end; neither as configuration nor as secret."""
    pipe, large = tmp_path / "pipe", tmp_path / "large"
    os.mkfifo(pipe)
    large.write_bytes(b"#" * (FILE_MAX + 1))
    for path, why in ((pipe, "not a regular file"), (large, "longer than 1048576 bytes"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=f"cannot be read: {why}"):
            load(path, Outer, environ={})
        with pytest.raises(ConfigError, match=f"cannot read the secret file '{path}': {why}"):
            read(f"inner: {{password: {{file: {path}}}}}")


def test_empty_file_means_defaults() -> None:
    """An empty file is a valid one."""
    assert read("") == read("# nothing\n") == Outer()


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file and a binary one are errors that name the file."""
    with pytest.raises(ConfigError, match="none.yml: cannot be read: No such file"):
        load(tmp_path / "none.yml", Outer, environ={})
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load(tmp_path / "binary.yml", Outer, environ={})


def test_secret_never_shows_itself(tmp_path: Path) -> None:
    """A secret comes from text, environment or file, and no way of printing shows it."""
    (tmp_path / "password").write_text("s3cr3t\n")
    for text in (
        "inner: {password: s3cr3t}",
        "inner: {password: '${PW}'}",
        f"inner: {{password: {{file: {tmp_path}/password}}}}",
    ):
        config = read(text, PW="s3cr3t")
        assert config.inner.password is not None
        assert config.inner.password.reveal() == "s3cr3t"
        assert "s3cr3t" not in f"{config} {config!r} {written(config)}"


def test_wrong_secret_is_not_in_the_error() -> None:
    """What stands where a secret belongs is not repeated in the error."""
    with pytest.raises(ConfigError) as failure:
        read("inner: {password: {file: 5, s3cr3t: hunter2}}")
    assert "hunter2" not in str(failure.value)
    assert "s3cr3t" not in str(failure.value)


def test_schema_describes_what_is_read() -> None:
    """The JSON Schema takes what the reader takes, refuses what it refuses, and knows the defaults."""
    schema = json_schema(Outer, title="x")
    jsonschema.Draft202012Validator.check_schema(schema)
    valid = jsonschema.Draft202012Validator(schema).is_valid
    assert valid({"inner": {"timeout": "1m30s", "limits": ["64MiB", 5], "password": {"file": "x"}}})
    assert not valid({"inner": {"timeout": 5}})
    assert not valid({"inner": {"hoem": "x"}})
    assert not valid({"inner": {"limits": ["1 potato"]}})
    assert schema["$defs"]["Inner"]["properties"]["timeout"]["default"] == "3s"


@given(st.integers(0, 10**9))
def test_durations_survive_writing(milliseconds: int) -> None:
    """A duration written for a person reads back as itself."""
    duration = Duration(milliseconds / 1000)
    assert Duration.parse(written(duration)) == pytest.approx(duration)


@given(st.integers(0, 2**60))
def test_sizes_survive_writing(size: int) -> None:
    """A size written for a person reads back as itself."""
    assert Size.parse(written(Size(size))) == size


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    """No text whatever gets anything but a value or a ConfigError."""
    try:
        read(text)
    except ConfigError as error:
        assert str(error).startswith("x.yml")
