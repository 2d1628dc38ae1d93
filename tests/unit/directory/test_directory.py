"""Directories: what a scan counts, what ends it, and what a scrape shows meanwhile. On real files."""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.collectors.directory import (
    DESCS,
    DirectoryCollector,
    DirectoryOptions,
    DirectoryPath,
    Scan,
    scan_directory,
)
from exporter.exposition import Format, render
from exporter.grammar import ConfigError, Duration, decode


def scan(
    path: Path, match: str = "*", *, entries: int = 100_000, seconds: float = 60, stop: threading.Event | None = None
) -> Scan:
    """Scan a directory with a budget that does not matter unless given."""
    return scan_directory(
        DirectoryPath(path=str(path), match=match),
        max_entries=entries,
        max_seconds=seconds,
        stop=stop or threading.Event(),
    )


def collector(*paths: Path, look: Callable[..., Scan] | None = None, **options: float) -> DirectoryCollector:
    """Return a collector of directories."""
    durations = {key: Duration(value) for key, value in options.items()}
    return DirectoryCollector(
        DirectoryOptions(paths=tuple(DirectoryPath(path=str(path)) for path in paths), **durations), look
    )


async def page(sought: DirectoryCollector, within: float = 5) -> dict[str, str]:
    """Return each sample of one scrape, as text."""
    text = render(sought.metrics(await sought.read(within)), Format.TEXT, account=None).decode()
    return dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 -- threads end without telling anyone
            await asyncio.sleep(0.005)


def allocated(*paths: Path) -> int:
    """Return what files occupy on the disk."""
    return sum(path.stat().st_blocks * 512 for path in paths)


def test_files_at_every_depth_count(tmp_path: Path) -> None:
    """Bytes, files and the oldest change are of all regular files below; directories, sockets and pipes do not count."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    files = [tmp_path / "one", tmp_path / "a" / "two", tmp_path / "a" / "b" / "three.log"]
    for size, file in enumerate(files):
        file.write_bytes(b"x" * 10_000 * size)
        os.utime(file, (1000 + size, 2000 + size))
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as endpoint, suppress(OSError):  # a path too long for a socket is no matter here
        endpoint.bind(str(tmp_path / "socket"))
    seen = scan(tmp_path)
    assert (seen.exists, seen.complete, seen.unreadable) == (True, True, 0)
    assert (seen.bytes, seen.files, seen.oldest) == (allocated(*files), 3, 2000)


def test_an_empty_directory_has_no_oldest_file(tmp_path: Path) -> None:
    """Nothing there is zero bytes and zero files, and no time."""
    seen = scan(tmp_path)
    assert (seen.exists, seen.bytes, seen.files, seen.oldest) == (True, 0, 0, None)


def test_bytes_are_what_the_disk_has_allocated(tmp_path: Path) -> None:
    """A sparse file of a gigabyte counts as the little that it occupies."""
    with (tmp_path / "sparse.log").open("wb") as file:
        file.seek(2**30)
        file.write(b"end")
    seen = scan(tmp_path)
    assert seen.bytes == allocated(tmp_path / "sparse.log")
    assert seen.bytes < 2**20


def test_a_file_with_two_names_counts_once(tmp_path: Path) -> None:
    """Hard links share their bytes."""
    (tmp_path / "one").write_bytes(b"x" * 9000)
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    seen = scan(tmp_path)
    assert (seen.files, seen.bytes) == (1, allocated(tmp_path / "one"))


def test_links_are_not_followed(tmp_path: Path) -> None:
    """Links to files, to directories, to nothing and to the root itself count for nothing; the root may be a link."""
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    root.mkdir()
    (outside / "big").write_bytes(b"x" * 100_000)
    (root / "own").write_bytes(b"x")
    for name, target in (("file", outside / "big"), ("folder", outside), ("nothing", tmp_path / "no"), ("loop", root)):
        (root / name).symlink_to(target)
    (tmp_path / "current").symlink_to(root)
    assert scan(root)[2:] == scan(tmp_path / "current")[2:]
    assert scan(root).files == 1
    assert scan(tmp_path / "nothing").exists is False


def test_only_files_that_match_count(tmp_path: Path) -> None:
    """The pattern is for names, at every depth, and knows upper from lower case."""
    (tmp_path / "old.log").mkdir()
    for name in ("app.log", "app.log.1", "APP.LOG", "app.txt", "old.log/app-2.log"):
        (tmp_path / name).write_text("x")
    assert scan(tmp_path, "*.log").files == 2
    assert scan(tmp_path, "*.log*").files == 3


def test_what_is_no_directory_does_not_exist(tmp_path: Path) -> None:
    """A path that is missing, or is a file, exists 0 and has no figures; nothing is made up."""
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "missing", tmp_path / "file", tmp_path / "file" / "below"):
        seen = scan(path)
        assert (seen.exists, seen.bytes, seen.files, seen.complete) == (False, None, None, True)


def test_what_cannot_be_read_is_counted(tmp_path: Path) -> None:
    """A directory that cannot be opened (here: its path is too long) is one unreadable entry, and the rest is counted."""
    deep, place = "d" * 250, os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):
        os.mkdir(deep, dir_fd=place)
        inner = os.open(deep, os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    os.close(place)
    (tmp_path / "file").write_text("x")
    seen = scan(tmp_path)
    assert (seen.unreadable, seen.files, seen.complete) == (1, 1, True)
    shutil.rmtree(tmp_path / deep)


def test_a_root_that_cannot_be_read_has_no_figures(tmp_path: Path) -> None:
    """Whether it exists is said only where it is known."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    seen = scan(tmp_path / "loop")
    assert (seen.exists, seen.bytes, seen.unreadable) == (None, None, 1)


UNPRIVILEGED = """
import os, sys, threading
from exporter.collectors.directory import DirectoryPath, scan_directory
if os.getuid() == 0:
    os.setresuid(65534, 65534, 65534)
for path in sys.argv[1:]:
    seen = scan_directory(DirectoryPath(path=path), max_entries=9, max_seconds=60, stop=threading.Event())
    print(seen.exists, seen.bytes, seen.files, seen.unreadable)
"""


def test_what_permissions_hide_is_unreadable_not_absent() -> None:
    """A root that may not be read exists; of one behind a closed door that is unknown; closed directories below count."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        for name in ("closed/behind", "open/closed", "open/listed"):
            (Path(folder) / name).mkdir(parents=True)
        (Path(folder) / "open" / "file").touch()
        (Path(folder) / "open" / "listed" / "file").touch()
        for name, mode in (("closed", 0), ("open/closed", 0), ("open/listed", 0o444)):
            (Path(folder) / name).chmod(mode)
        paths = [f"{folder}/{name}" for name in ("closed", "closed/behind", "open")]
        done = subprocess.run(  # noqa: S603 -- the text above
            [sys.executable, "-c", UNPRIVILEGED, *paths], capture_output=True, text=True, check=True
        )
        for name in ("closed", "open/closed", "open/listed"):
            (Path(folder) / name).chmod(0o755)
    assert done.stdout.splitlines() == ["True None None 1", "None None None 1", "True 0 1 2"]


@pytest.mark.parametrize("entries", [1, 10, 39, 40])
def test_the_budget_of_entries_cuts_a_scan_short(entries: int, tmp_path: Path) -> None:
    """A scan sees at most as many entries as it may, says so, and reports what it saw."""
    for number in range(40):
        (tmp_path / f"{number}").write_text("x")
    seen = scan(tmp_path, entries=entries)
    assert (seen.files, seen.complete) == (entries, entries == 40)


def test_the_budget_of_seconds_cuts_a_scan_short(tmp_path: Path) -> None:
    """Without a second left, nothing is counted and the scan is not complete."""
    (tmp_path / "file").write_text("x")
    seen = scan(tmp_path, seconds=0)
    assert (seen.exists, seen.files, seen.complete) == (True, 0, False)


def test_a_scan_stops_when_told(tmp_path: Path) -> None:
    """At its next pause a scan sees that it is to stop."""
    for number in range(600):
        (tmp_path / f"{number}").touch()
    stop = threading.Event()
    stop.set()
    seen = scan(tmp_path, stop=stop)
    assert not seen.complete
    assert (seen.files or 0) < 600


def test_files_that_vanish_meanwhile_are_no_failure(tmp_path: Path) -> None:
    """While another thread makes and removes files and directories, a hundred scans raise nothing."""
    done = threading.Event()

    def churn() -> None:
        while not done.is_set():
            for number in range(20):
                (tmp_path / f"d{number}").mkdir(exist_ok=True)
                (tmp_path / f"d{number}" / "file").touch()
            for number in range(20):
                shutil.rmtree(tmp_path / f"d{number}")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        assert all(scan(tmp_path).complete for _ in range(100))
    finally:
        done.set()
        thread.join()


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=8)
TREES = st.recursive(
    st.integers(0, 20_000),
    lambda inner: st.dictionaries(NAMES.filter(lambda name: name not in {".", ".."}), inner, max_size=4),
)


@given(st.dictionaries(st.sampled_from(["a", "b", "ü", "x y", "-rf", "\n"]), TREES, max_size=4))
def test_any_tree_is_measured_in_full(tree: dict[str, object]) -> None:
    """Whatever names and depths, the sum is that of every file."""
    files: list[Path] = []

    def make(folder: Path, inside: dict[str, object]) -> None:
        for name, content in inside.items():
            if isinstance(content, dict):
                (folder / name).mkdir()
                make(folder / name, content)
            elif isinstance(content, int):
                (folder / name).write_bytes(b"x" * content)
                files.append(folder / name)

    with TemporaryDirectory() as folder:
        make(Path(folder), tree)
        seen = scan(Path(folder))
        assert (seen.files, seen.bytes, seen.complete) == (len(files), allocated(*files), True)


async def test_the_first_scan_comes_at_once_and_later_ones_at_the_interval(tmp_path: Path) -> None:
    """Before the first scan has ended there is nothing; then its figures; after the interval the next ones."""
    (tmp_path / "file").write_bytes(b"x" * 5000)
    sought = collector(tmp_path, tmp_path / "missing", interval=1)
    work = asyncio.create_task(sought.run())
    await asyncio.sleep(0)
    assert await page(sought) == {}
    seen: dict[str, str] = {}

    async def shown(sample: str, value: str) -> None:
        async with asyncio.timeout(20):
            while seen.get(sample) != value:
                seen.update(await page(sought))
                await asyncio.sleep(0.01)

    await shown(f'pm2_directory_exists{{path="{tmp_path}/missing"}}', "0")
    assert seen[f'pm2_directory_bytes{{path="{tmp_path}"}}'] == str(allocated(tmp_path / "file"))
    assert seen[f'pm2_directory_scan_complete{{path="{tmp_path}"}}'] == "1"
    assert f'pm2_directory_bytes{{path="{tmp_path}/missing"}}' not in seen
    (tmp_path / "another").touch()
    await shown(f'pm2_directory_files{{path="{tmp_path}"}}', "2")
    work.cancel()
    with suppress(asyncio.CancelledError):
        await work


async def test_the_end_of_run_ends_the_scan(tmp_path: Path) -> None:
    """When the background work is cancelled, the thread that scans is told to stop."""
    told: list[threading.Event] = []

    def look(_: DirectoryPath, *, stop: threading.Event, **budget: float) -> Scan:
        assert budget
        told.append(stop)
        stop.wait(60)
        return Scan(at=0, duration=0, exists=True)

    work = asyncio.create_task(collector(tmp_path, look=look).run())
    await until(lambda: bool(told))
    work.cancel()
    with suppress(asyncio.CancelledError):
        await work
    assert told[0].is_set()


async def test_a_single_scrape_scans_by_itself(tmp_path: Path) -> None:
    """Where nobody runs the background work, the first read scans, and the second shows what the first one saw."""
    (tmp_path / "file").touch()
    sought = collector(tmp_path)
    first = await page(sought)
    assert first[f'pm2_directory_files{{path="{tmp_path}"}}'] == "1"
    assert await page(sought) == first
    assert {name.partition("{")[0] for name in first} == {desc.name for desc in DESCS}


async def test_a_single_scrape_keeps_its_deadline(tmp_path: Path) -> None:
    """A first read whose directory hangs returns in time, says that it hangs, and leaves its neighbour out."""
    back = threading.Event()

    def look(_: DirectoryPath, **budget: object) -> Scan:
        assert budget
        back.wait(60)
        return Scan(at=0, duration=0, exists=True)

    sought = collector(tmp_path / "a", tmp_path / "b", look=look)
    async with asyncio.timeout(30):
        seen = await page(sought, within=0.1)
    assert seen == {f'pm2_directory_scan_complete{{path="{tmp_path}/a"}}': "0"}
    back.set()
    await until(lambda: not any(thread.name == "scan" for thread in threading.enumerate()))


async def test_a_scan_that_hangs_delays_its_neighbours_once(tmp_path: Path) -> None:
    """A hanging directory is left alone, its neighbour is scanned on, and its late answer is taken when it comes."""
    back, asked = threading.Event(), []

    def look(path: DirectoryPath, **budget: object) -> Scan:
        assert budget
        asked.append(Path(path.path).name)
        if asked.count("dead") == 1 and asked[-1] == "dead":
            back.wait(60)
        return Scan(at=len(asked), duration=0, exists=True)

    sought = DirectoryCollector(
        DirectoryOptions(
            paths=(DirectoryPath(path=str(tmp_path / "dead")), DirectoryPath(path=str(tmp_path / "live"))),
            interval=Duration(1),
            max_duration=Duration(0.1),
        ),
        look,
        grace=0.1,
    )
    work = asyncio.create_task(sought.run())
    await until(lambda: asked.count("live") >= 2)
    assert asked.count("dead") == 1
    seen = await page(sought)
    assert seen[f'pm2_directory_scan_complete{{path="{tmp_path}/dead"}}'] == "0"
    assert seen[f'pm2_directory_scan_complete{{path="{tmp_path}/live"}}'] == "1"
    assert f'pm2_directory_scan_timestamp_seconds{{path="{tmp_path}/dead"}}' not in seen
    back.set()
    await until(lambda: asked.count("dead") >= 2)
    assert (await page(sought))[f'pm2_directory_scan_complete{{path="{tmp_path}/dead"}}'] == "1"
    work.cancel()
    with suppress(asyncio.CancelledError):
        await work


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("paths: [{path: /a}, {path: /b/../a/}]", "'/b/../a/' is there twice"),
        ("paths: [{path: logs}]", "paths\\[0\\].path: must be absolute or start with ~/"),
        ("paths: [{path: /a, match: 'x/*.log'}]", "match: is a pattern for names"),
        ("interval: 500ms", "interval: must be at least 1s"),
        ("max_duration: 0", "max_duration: must be more than 0"),
        ("max_entries: 0", ">= 1"),
        ("paths: [{path: /a, recursive: true}]", "unknown key"),
    ],
)
def test_wrong_options_are_config_errors(text: str, rule: str) -> None:
    """Each wrong option is refused with its rule."""
    with pytest.raises(ConfigError, match=rule):
        decode(text, DirectoryOptions, file="exporter.yml", environ={})


def test_a_home_directory_is_filled_in() -> None:
    """A path below ~ is the home directory's, and the label stays as written."""
    assert DirectoryPath(path="~/logs").where() == Path.home() / "logs"
