"""Filesystems: which mounts are reported, and what becomes of those that fail or hang (a statvfs that blocks)."""

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.collectors.filesystem import (
    DESCS,
    FilesystemCollector,
    FilesystemOptions,
    Mount,
    Seen,
    Space,
    parse_mounts,
)
from exporter.exposition import Format, render
from exporter.grammar import ConfigError, Duration, decode

ANSWER = os.statvfs_result((4096, 4096, 100, 50, 40, 30, 20, 20, 0, 255))
SPACE = Space(409600, 204800, 163840, 30, 20)


def nfs(count: int) -> Iterable[str]:
    """Return lines of the mount table for network filesystems."""
    return (f"server:/export/{number} /home/{number} nfs4 rw,relatime 0 0" for number in range(count))


def table(tmp_path: Path, *lines: str) -> Path:
    """Write a mount table, and return the /proc that it is in."""
    (tmp_path / "mounts").write_text("".join(f"{line}\n" for line in lines))
    return tmp_path


def answered(seen: Seen) -> dict[str, bool]:
    """Return which mount points answered."""
    return {mount.mountpoint: space is not None for mount, space in seen}


def asking() -> int:
    """Return how many threads wait for a filesystem."""
    return sum(thread.name == "statvfs" for thread in threading.enumerate())


class Server:
    """A statvfs that hangs for the paths that are `dead`, until `back` is set."""

    def __init__(self, dead: Callable[[str], bool]) -> None:
        """Nothing has been asked yet."""
        self.dead, self.back = dead, threading.Event()
        self.asked: Counter[str] = Counter()

    def __call__(self, path: str) -> os.statvfs_result:
        """Answer, or hang."""
        self.asked[path] += 1
        if self.dead(path):
            self.back.wait(60)
        return ANSWER


def collector(proc: Path, statvfs: Callable[[str], os.statvfs_result], timeout: float = 0.3) -> FilesystemCollector:
    """Return a collector that gives up after `timeout` seconds."""
    return FilesystemCollector(FilesystemOptions(timeout=Duration(timeout)), proc, statvfs)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 -- threads end without telling anyone
            await asyncio.sleep(0.005)


def test_the_mount_table_is_read_as_the_kernel_writes_it() -> None:
    """Escapes in mount points are undone, devices stay as they are, ro is an option of its own, other text is no line."""
    text = (
        "/dev/sda1 / ext4 rw,errors=remount-ro 0 0\n"
        r"//server/my\040share /mnt/my\040share\011\134x cifs ro,vers=3 0 0"
        "\n\nnonsense\n none\n"
        "dev\u00a0ice /nbsp\u00a0x tmpfs rw 0 0\n"
    )
    assert parse_mounts(text) == [
        Mount("/dev/sda1", "ext4", "/", readonly=False),
        Mount(r"//server/my\040share", "cifs", "/mnt/my share\t\\x", readonly=True),
        Mount("dev\u00a0ice", "tmpfs", "/nbsp\u00a0x", readonly=False),
    ]


def test_a_mount_that_is_there_twice_is_reported_once_as_mounted_last() -> None:
    """The same device, type and mount point make one series; the mount on top says whether it is read-only."""
    text = "tmpfs /a tmpfs rw 0 0\nx /b tmpfs rw 0 0\ntmpfs /a tmpfs ro 0 0\n"
    assert parse_mounts(text) == [Mount("tmpfs", "tmpfs", "/a", readonly=True), Mount("x", "tmpfs", "/b", readonly=False)]


def test_the_root_prefix_is_taken_off() -> None:
    """In a container with the machine's root below /host, mount points are called as on the machine."""
    text = "/dev/sda1 /host ext4 rw 0 0\n/dev/sdb1 /host/data ext4 rw 0 0\n"
    assert [mount.mountpoint for mount in parse_mounts(text, "/host")] == ["/", "/data"]


@given(st.text())
def test_any_text_is_read_without_raising(text: str) -> None:
    """The parser takes any text, and what it makes of it can be filtered and rendered."""
    for mount in parse_mounts(text) + parse_mounts(f"{text} {text} {text} {text}"):
        render(FilesystemCollector(FilesystemOptions()).metrics([(mount, SPACE), (mount, None)]), Format.TEXT)


SEVERAL = (
    "/dev/sda1 / ext4 rw 0 0",
    "overlay /var/lib/docker/overlay2/x/merged overlay rw 0 0",
    "tmpfs /run tmpfs rw 0 0",
    "tmpfs /dev/hidden tmpfs rw 0 0",
    "/dev/sdb1 /mnt/volume xfs rw 0 0",
    "proc /proc proc rw 0 0",
)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"/", "/run", "/mnt/volume"}),
        ({"mount_points_exclude": "^/mnt"}, {"/", "/run", "/dev/hidden"}),
        ({"mount_points_exclude": "", "fs_types_exclude": ""}, {line.split()[1] for line in SEVERAL}),
        ({"mount_points_include": "^/dev"}, {"/dev/hidden"}),
        ({"fs_types_include": "^(overlay|xfs)$", "mount_points_exclude": ""}, {"/mnt/volume", SEVERAL[1].split()[1]}),
        ({"fs_types_include": "^tmpfs$", "fs_types_exclude": "^tmp"}, set()),
    ],
    ids=["defaults", "exclude", "exclude-nothing", "include-lifts-the-default", "include-types", "both-apply"],
)
async def test_filters(options: dict[str, str], expected: set[str], tmp_path: Path) -> None:
    """Mount points and types are both included and not excluded; an include lifts the default exclude beside it."""
    sought = FilesystemCollector(FilesystemOptions(**options), table(tmp_path, *SEVERAL), lambda _: ANSWER)
    assert set(answered(await sought.read(5))) == expected


async def test_the_machines_own_table_is_read_where_it_may_be(tmp_path: Path) -> None:
    """Process 1's mount table wins over this process's; without either the collector fails."""
    (tmp_path / "1").mkdir()
    table(tmp_path, "/dev/sda1 / ext4 rw 0 0")
    table(tmp_path / "1", "/dev/sda1 / ext4 rw 0 0", "/dev/sdb1 /data ext4 rw 0 0")
    seen = await collector(tmp_path, lambda _: ANSWER).read(5)
    assert answered(seen) == {"/": True, "/data": True}
    (tmp_path / "1" / "mounts").unlink()
    assert answered(await collector(tmp_path, lambda _: ANSWER).read(5)) == {"/": True}
    (tmp_path / "mounts").unlink()
    with pytest.raises(FileNotFoundError):
        await collector(tmp_path, lambda _: ANSWER).read(5)


async def test_bytes_are_blocks_of_the_fragment_size(tmp_path: Path) -> None:
    """Sizes are counted in f_frsize, whatever I/O size a filesystem would like."""
    said = os.statvfs_result((1 << 20, 512, 100, 50, 40, 30, 20, 20, 0, 255))
    seen = await collector(table(tmp_path, "s /s fuse.sshfs rw 0 0"), lambda _: said).read(5)
    assert [space for _, space in seen] == [Space(51200, 25600, 20480, 30, 20)]


async def test_an_error_is_one_mounts_own(tmp_path: Path) -> None:
    """A mount that has gone, or refuses, has device_error 1 and no other sample; the rest is whole."""

    def statvfs(path: str) -> os.statvfs_result:
        if path == "/gone":
            raise FileNotFoundError(2, "gone", path)
        return ANSWER

    proc = table(tmp_path, "/dev/sda1 / ext4 rw 0 0", "/dev/sdb1 /gone ext4 rw 0 0")
    sought = collector(proc, statvfs)
    page = render(sought.metrics(await sought.read(5)), Format.TEXT, account=None).decode()
    gone = [line for line in page.splitlines() if "/gone" in line]
    assert gone == ['node_filesystem_device_error{device="/dev/sdb1",fstype="ext4",mountpoint="/gone"} 1']
    assert page.count('mountpoint="/"') == len(DESCS)


async def test_a_mounted_directory_that_was_removed_is_an_error_of_its_own(tmp_path: Path) -> None:
    """A mount point that is in the table but not on the disk is a device error, with the real statvfs."""
    proc = table(tmp_path, f"/dev/sda1 {tmp_path} ext4 rw 0 0", f"/dev/sdb1 {tmp_path}/gone ext4 rw 0 0")
    assert answered(await collector(proc, os.statvfs).read(5)) == {str(tmp_path): True, f"{tmp_path}/gone": False}


async def test_a_mount_that_hangs_is_not_asked_again_until_its_call_returns(tmp_path: Path) -> None:
    """It is an error from the first scrape on, costs later scrapes nothing, and is asked anew once it has come back."""
    server = Server(lambda path: path == "/home/0")
    sought = collector(table(tmp_path, "/dev/sda1 / ext4 rw 0 0", *nfs(1)), server)
    for _ in range(5):
        assert answered(await sought.read(60)) == {"/": True, "/home/0": False}
    assert server.asked == {"/": 5, "/home/0": 1}
    server.dead = lambda _: False
    server.back.set()
    await until(lambda: not asking())
    assert answered(await sought.read(60)) == {"/": True, "/home/0": True}
    assert server.asked["/home/0"] == 2


async def test_threads_are_bounded_and_a_dead_server_hides_no_local_disk(tmp_path: Path) -> None:
    """A hundred hanging network mounts take 16 threads, and the local disk, with a thread of its own, is seen each time."""
    server = Server(lambda path: path != "/")
    sought = collector(table(tmp_path, *nfs(100), "/dev/sda1 / ext4 rw 0 0"), server)
    for _ in range(3):
        seen = answered(await sought.read(60))
        assert seen.pop("/")
        assert len(seen) == 100
        assert not any(seen.values())
        assert asking() <= 16 + 1
    assert sum(server.asked.values()) <= 16 + 3
    server.dead = lambda _: False
    server.back.set()
    await until(lambda: not asking())
    assert all(answered(await sought.read(60)).values())


async def test_a_few_hanging_mounts_do_not_hide_their_healthy_neighbours(tmp_path: Path) -> None:
    """Network mounts that answer are seen in the very scrape in which others begin to hang."""
    server = Server(lambda path: path in {"/home/0", "/home/3", "/home/4"})
    seen = answered(await collector(table(tmp_path, *nfs(8)), server, timeout=5).read(1))
    assert [path for path, answer in seen.items() if not answer] == ["/home/0", "/home/3", "/home/4"]
    server.back.set()
    await until(lambda: not asking())


async def test_the_scrapes_deadline_comes_before_the_timeout(tmp_path: Path) -> None:
    """A scrape that has little time left does not wait for the whole timeout."""
    server = Server(lambda _: True)
    sought = collector(table(tmp_path, *nfs(1)), server, timeout=3600)
    async with asyncio.timeout(30):
        assert answered(await sought.read(0.05)) == {"/home/0": False}
    server.back.set()
    await until(lambda: not asking())


async def test_two_scrapes_at_once_ask_a_hanging_mount_once(tmp_path: Path) -> None:
    """Overlapping scrapes share the question; the hasty one's giving up does not take the answer from the patient one."""
    server = Server(lambda _: True)
    sought = collector(table(tmp_path, *nfs(1)), server, timeout=30)
    patient = asyncio.create_task(sought.read(30))
    await until(lambda: bool(server.asked))
    assert answered(await sought.read(0.05)) == {"/home/0": False}
    server.back.set()
    assert answered(await patient) == {"/home/0": True}
    assert server.asked == {"/home/0": 1}


async def test_what_is_unmounted_is_forgotten(tmp_path: Path) -> None:
    """A mount that has left the table has left the page too."""
    sought = collector(table(tmp_path, *nfs(2)), lambda _: ANSWER)
    assert len(await sought.read(5)) == 2
    table(tmp_path, *nfs(1))
    assert answered(await sought.read(5)) == {"/home/0": True}


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("mount_points_exclude: '['", "mount_points_exclude: expected a regular expression"),
        ("fs_types_include: '*'", "fs_types_include: expected a regular expression"),
        ("rootfs: host", "rootfs: must be an absolute path"),
        ("mount_point_exclude: x", "unknown key"),
    ],
)
def test_wrong_options_are_config_errors(text: str, rule: str) -> None:
    """Each wrong option is refused with its rule."""
    with pytest.raises(ConfigError, match=rule):
        decode(text, FilesystemOptions, file="exporter.yml", environ={})
