"""Real mounts in a mount namespace of their own: odd names, stacks and binds; and a filesystem that hangs for real."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from exporter.collectors import filesystem
from tests.integration.host.conftest import parse, program
from tests.integration.host.test_node_exporter import assert_same, names

ROOT = Path(__file__).parents[3]


def in_namespace(*arguments: str) -> dict[str, Any]:
    """Run mounts.py where it may mount, and return what it prints; skip the test where the system does not let it."""
    unshare = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if os.getuid():
        unshare.append("--map-root-user")
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:  # noqa: S603 -- literals
        pytest.skip("this system does not let the tests make mount namespaces (try it as root)")
    done = subprocess.run(  # noqa: S603 -- the program of these tests
        [*unshare, sys.executable, "-m", "tests.integration.host.mounts", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_odd_mounts_are_seen_as_node_exporter_sees_them(tmp_path: Path) -> None:
    """Space, read-only, bind, stack: the same series and values. Only a backslash it cannot ask about, and we can."""
    seen = in_namespace("table", str(tmp_path), program())
    ours, theirs = parse(seen["ours"]), parse(seen["theirs"])
    backslash = {series for series in ours.samples if any("back" in value for _, value in series[1])}
    assert len(backslash) == len(filesystem.DESCS)
    for page in (ours, theirs):
        for series in [series for series in page.samples if any("back" in value for _, value in series[1])]:
            del page.samples[series]
    assert_same(ours, theirs, ours, names(filesystem))
    values = {
        (name, dict(labels)["mountpoint"].removeprefix(str(tmp_path))): value
        for (name, labels), value in ours.samples.items()
    }
    assert values["node_filesystem_size_bytes", "/with space"] == 2**20
    assert values["node_filesystem_files", "/with space"] == 64
    assert values["node_filesystem_readonly", "/read-only"] == 1
    assert values["node_filesystem_readonly", "/plain"] == 0
    assert values["node_filesystem_size_bytes", "/stacked"] == 2 * 2**20
    assert values["node_filesystem_size_bytes", "/bound"] == 2**20


def test_a_scan_stays_on_its_filesystem_unless_told_otherwise(tmp_path: Path) -> None:
    """A filesystem mounted below a scanned directory is left out by default, and counted where one_file_system is off."""
    seen = in_namespace("table", str(tmp_path), "")
    assert (seen["stays"]["files"], seen["stays"]["bytes"]) == (1, 8192)
    assert (seen["crosses"]["files"], seen["crosses"]["bytes"]) == (2, 8192 + 12288)
    assert seen["stays"]["complete"]
    assert seen["crosses"]["complete"]


def test_a_filesystem_that_hangs_is_given_up_and_taken_back(tmp_path: Path) -> None:
    """FUSE without a server: an error in time, no more threads, the rest still seen, recovery, and the process can end."""
    if not Path("/dev/fuse").exists():
        pytest.skip("no /dev/fuse here")
    story = in_namespace("hang", str(tmp_path))
    dead = str(tmp_path / "dead")
    assert story["hanging"] == {"/": True, dead: False}
    assert story["given up"] == {"/": True, dead: False}
    assert story["threads"] == [story["threads"][0]] * 2
    assert story["broken"] == {"/": True, dead: False}
    assert story["replaced"] == {"/": True, dead: True}
    assert story["hanging at exit"] == {"/": True, dead: False}
