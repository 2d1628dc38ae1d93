"""Run by the tests in a mount namespace of its own: mounts real filesystems, looks at them, prints what was seen as JSON.

`mounts.py table FOLDER [NODE_EXPORTER]`: odd but healthy mounts, seen by both exporters, and directories across mounts.
`mounts.py hang FOLDER`: FUSE filesystems whose server never answers, so that statvfs(2) really hangs.
"""

import asyncio
import ctypes
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from exporter.collectors.directory import DirectoryPath, scan_directory
from exporter.collectors.filesystem import FilesystemCollector, FilesystemOptions
from exporter.exposition import Format, render
from tests.integration.host.conftest import NodeExporter

libc = ctypes.CDLL(None, use_errno=True)


def mount(*arguments: str | Path) -> None:
    """Mount, with the arguments of the command of that name."""
    subprocess.run(["mount", *map(str, arguments)], check=True)  # noqa: S603, S607 -- in a namespace of the test's


def dead_fuse(folder: Path) -> int:
    """Mount a FUSE filesystem that nobody serves; it hangs until the returned descriptor is closed."""
    folder.mkdir(exist_ok=True)
    descriptor = os.open("/dev/fuse", os.O_RDWR)
    data = f"fd={descriptor},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    if libc.mount(b"dead", os.fsencode(folder), b"fuse", 6, data.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return descriptor


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 -- threads end without telling anyone
            await asyncio.sleep(0.01)


async def table(folder: Path, node_exporter: str) -> dict[str, object]:
    """Mount odd but healthy filesystems."""
    for name in ("plain", "with space", "back\\slash", "read-only", "stacked", "tree", "tree/below"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        mount("-t", "tmpfs", "-o", "size=1m,nr_inodes=64", f"dev {name}", folder / name)
        if name == "tree":
            (folder / "tree" / "file").write_bytes(b"x" * 5000)
            (folder / "tree" / "below").mkdir()
    (folder / "tree" / "below" / "file").write_bytes(b"x" * 9000)
    mount("-o", "remount,ro", folder / "read-only")
    mount("-t", "tmpfs", "-o", "size=2m", "upon stacked", folder / "stacked")
    (folder / "bound").mkdir()
    mount("--bind", folder / "plain", folder / "bound")
    collector = FilesystemCollector(FilesystemOptions())
    ours = render(collector.metrics(await collector.read(5)), Format.TEXT, account=None).decode()
    theirs = ""
    if node_exporter:
        options = FilesystemOptions()
        other = NodeExporter(
            node_exporter,
            "--collector.disable-defaults",
            "--web.disable-exporter-metrics",
            "--collector.filesystem",
            f"--collector.filesystem.mount-points-exclude={options.mount_points_exclude}",
            f"--collector.filesystem.fs-types-exclude={options.fs_types_exclude}",
        )
        theirs = other.text()
        other.stop()
    stays, crosses = (
        scan_directory(
            DirectoryPath(path=str(folder / "tree"), one_file_system=one),
            max_entries=100,
            max_seconds=60,
            stop=threading.Event(),
        )
        for one in (True, False)
    )
    return {"ours": ours, "theirs": theirs, "stays": stays._asdict(), "crosses": crosses._asdict()}


async def hang(folder: Path) -> dict[str, object]:
    """Have a filesystem hang, be given up, die, be replaced; and another one hang until the end of this process."""
    mountpoint = folder / "dead"
    dead = dead_fuse(mountpoint)
    options = {"mount_points_include": f"^(/|{mountpoint})$", "fs_types_include": "."}
    collector = FilesystemCollector(FilesystemOptions(**options))
    story: dict[str, object] = {}

    async def look(name: str, within: float = 1) -> None:
        seen = await collector.read(within)
        story[name] = {mount.mountpoint: space is not None for mount, space in seen}

    await look("hanging")
    threads = threading.active_count()
    for _ in range(100):
        await look("given up", within=60)
    await until(lambda: threading.active_count() <= threads)
    story["threads"] = [threads, threading.active_count()]
    os.close(dead)
    await until(lambda: threading.active_count() == 1)
    await look("broken", within=60)
    subprocess.run(["umount", "--lazy", str(mountpoint)], check=True)  # noqa: ASYNC221, S603, S607 -- nothing else runs
    mount("-t", "tmpfs", "back", mountpoint)
    await look("replaced", within=60)
    dead_fuse(mountpoint)
    await look("hanging at exit")
    return story


if __name__ == "__main__":
    what, place, *rest = sys.argv[1:]
    work = table(Path(place), *rest) if what == "table" else hang(Path(place))
    print(json.dumps(asyncio.run(work)), flush=True)  # noqa: T201 -- the answer to the test
