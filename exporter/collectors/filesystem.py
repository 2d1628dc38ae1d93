"""Mounted filesystems: size, free space and files, with node_exporter's names, labels and meaning.

A filesystem whose server is gone makes statvfs(2) hang for as long as the server is. So statvfs is only ever called in
daemon threads, of which there is a fixed number at most; a mount that does not answer is reported with
`node_filesystem_device_error 1` and left alone until the hanging call returns. Filesystems on local devices have threads of
their own, so that any number of hanging network filesystems cannot hide a full disk.

Sources: proc(5) /proc/PID/mounts, statvfs(3).
"""

import asyncio
import contextlib
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from exporter.exposition import Desc, Metric, gauge
from exporter.grammar import Duration, Regex, Strict, default

MOUNT_POINTS_EXCLUDE = Regex(r"^/(dev|proc|run/credentials/.+|sys|var/lib/docker/.+|var/lib/containers/storage/.+)($|/)")
FS_TYPES_EXCLUDE = Regex(
    r"^(autofs|binfmt_misc|bpf|cgroup2?|configfs|debugfs|devpts|devtmpfs|fusectl|hugetlbfs|iso9660|mqueue|nsfs|overlay|proc"
    r"|procfs|pstore|rpc_pipefs|securityfs|selinuxfs|squashfs|erofs|sysfs|tracefs)$"
)

_LABELS = ("device", "fstype", "mountpoint")
_SIZE = gauge("node_filesystem_size_bytes", "Size of the filesystem.", _LABELS, source="statvfs f_blocks")
_FREE = gauge("node_filesystem_free_bytes", "Free bytes, root's reserve included.", _LABELS, source="statvfs f_bfree")
_AVAIL = gauge(
    "node_filesystem_avail_bytes", "Free bytes that a user without privileges may fill.", _LABELS, source="statvfs f_bavail"
)
_FILES = gauge("node_filesystem_files", "File nodes (inodes) that there can be.", _LABELS, source="statvfs f_files")
_FILES_FREE = gauge("node_filesystem_files_free", "File nodes that are free.", _LABELS, source="statvfs f_ffree")
_READONLY = gauge("node_filesystem_readonly", "1 if mounted read-only.", _LABELS, source="/proc/1/mounts")
_DEVICE_ERROR = gauge(
    "node_filesystem_device_error",
    "1 if the filesystem could not be asked: it reported an error, or it hangs.",
    _LABELS,
    source="statvfs",
)

DESCS: tuple[Desc, ...] = (_SIZE, _FREE, _AVAIL, _FILES, _FILES_FREE, _READONLY, _DEVICE_ERROR)


class FilesystemOptions(Strict, frozen=True, kw_only=True):
    """Mounted filesystems (`node_filesystem_*`).

    The four expressions are regular expressions, searched in the text; "" is none. A filesystem is reported where both its
    mount point and its type are included and not excluded.
    """

    mount_points_include: Regex = default(Regex())
    """Mount points to report; default: all. Where it is given, the default of `mount_points_exclude` does not hold."""
    mount_points_exclude: Regex = default(MOUNT_POINTS_EXCLUDE)
    """Mount points to leave out; default: the system's own and containers', as node_exporter does."""
    fs_types_include: Regex = default(Regex())
    """Filesystem types to report; default: all. Where it is given, the default of `fs_types_exclude` does not hold."""
    fs_types_exclude: Regex = default(FS_TYPES_EXCLUDE)
    """Filesystem types to leave out; default: those that store nothing, and container layers, as node_exporter does."""
    timeout: Duration = default(Duration(5))
    """How long a scrape waits for a filesystem until it counts as hanging; never beyond its own deadline. Default 5s."""
    rootfs: str = "/"
    """Where the machine's root directory is found: "/host" in a container that has it mounted there. Default "/"."""

    def __post_init__(self) -> None:
        """Hold the rule that a path is absolute."""
        if not self.rootfs.startswith("/"):
            raise ValueError("rootfs must be an absolute path")


class Mount(NamedTuple):
    """One line of the mount table."""

    device: str
    fstype: str
    mountpoint: str
    readonly: bool


class Space(NamedTuple):
    """What a filesystem says of itself; bytes and file nodes."""

    size: int
    free: int
    avail: int
    files: int
    files_free: int


Seen = Sequence[tuple[Mount, Space | None]]
"""The filesystems; None: it did not answer, or with an error."""


class FilesystemCollector:
    """Reads the mount table and asks each filesystem."""

    descs = DESCS

    def __init__(
        self,
        options: FilesystemOptions,
        proc: Path = Path("/proc"),
        statvfs: Callable[[str], os.statvfs_result] = os.statvfs,
    ) -> None:
        """Read the mount table below `proc` and ask through `statvfs`."""
        # The mounts of process 1 are the machine's, whatever this process's own namespace hides; not all may read them.
        self._tables = (f"{proc}/1/mounts", f"{proc}/mounts")
        self._wanted = _Filter(options)
        self._timeout, self._root = float(options.timeout), options.rootfs.rstrip("/")
        self._asked: dict[str, _Question] = {}
        self._answered = asyncio.Event()
        self._local, self._remote = _Lane(statvfs), _Lane(statvfs)

    async def read(self, within: float) -> Seen:
        """Ask every filesystem that is wanted; raise OSError where there is no mount table."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + min(within, self._timeout)
        mounts = [mount for mount in parse_mounts(self._table(), self._root) if self._wanted(mount)]
        questions = [self._ask(mount) for mount in mounts]
        waited = [question for question in questions if not question.hangs]
        while not all(question.done for question in waited) and (patience := deadline - loop.time()) > 0:
            self._answered.clear()
            for lane in (self._local, self._remote):
                lane.staff(loop, self._answered.set)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(patience, _HIRE_AFTER)):
                    await self._answered.wait()
        for question in questions:
            question.hangs = not question.done
        self._asked = {path: question for path, question in self._asked.items() if not question.done}
        return [(mount, question.answer) for mount, question in zip(mounts, questions, strict=True)]

    def metrics(self, seen: Seen) -> Iterable[Metric]:
        """Turn what was seen into metrics. Pure."""
        answers = [((mount.device, mount.fstype, mount.mountpoint), mount, space) for mount, space in seen]
        yield Metric(_DEVICE_ERROR, [(labels, int(space is None)) for labels, _, space in answers])
        spaces = [(labels, space) for labels, _, space in answers if space]
        for desc, field in ((_SIZE, 0), (_FREE, 1), (_AVAIL, 2), (_FILES, 3), (_FILES_FREE, 4)):
            yield Metric(desc, [(labels, space[field]) for labels, space in spaces])
        yield Metric(_READONLY, [(labels, int(mount.readonly)) for labels, mount, space in answers if space])

    def _table(self) -> str:
        for path in self._tables[:-1]:
            with contextlib.suppress(OSError):
                return os.fsdecode(Path(path).read_bytes())
        return os.fsdecode(Path(self._tables[-1]).read_bytes())

    def _ask(self, mount: Mount) -> "_Question":
        """Return the question to this mount that is still open, else a new one."""
        question = self._asked.get(mount.mountpoint)
        if question is None or question.done:
            question = self._asked[mount.mountpoint] = _Question((self._root + mount.mountpoint) or "/")
            lane = self._local if mount.device.startswith("/dev/") or mount.fstype in _LOCAL else self._remote
            lane.put(question)
        return question


class _Filter:
    """Which mounts are wanted."""

    def __init__(self, options: FilesystemOptions) -> None:
        self._mount_points = (
            re.compile(options.mount_points_include),
            _exclusion(options.mount_points_include, options.mount_points_exclude, MOUNT_POINTS_EXCLUDE),
        )
        self._fs_types = (
            re.compile(options.fs_types_include),
            _exclusion(options.fs_types_include, options.fs_types_exclude, FS_TYPES_EXCLUDE),
        )

    def __call__(self, mount: Mount) -> bool:
        return all(
            included.search(text) and not excluded.search(text)
            for (included, excluded), text in ((self._fs_types, mount.fstype), (self._mount_points, mount.mountpoint))
        )


def _exclusion(include: str, exclude: str, usual: str) -> re.Pattern[str]:
    nothing = not exclude or (include and exclude == usual)
    return re.compile(r"(?!)" if nothing else exclude)


_ESCAPE = re.compile(r"\\([0-7]{3})")
_FIELDS = 4


def parse_mounts(text: str, root: str = "") -> list[Mount]:
    """Read /proc/PID/mounts: each (device, type, mount point) once, as it was mounted last.

    `root` is taken off the front of mount points. Lines that are none are skipped. The device stays as the kernel escapes
    it, because node_exporter's label does.
    """
    mounts: dict[tuple[str, str, str], Mount] = {}
    for line in text.split("\n"):
        words = line.split(" ")
        if len(words) < _FIELDS or "" in words[:_FIELDS]:
            continue
        device, mountpoint, fstype, options = words[:_FIELDS]
        if "\\" in mountpoint:
            mountpoint = _ESCAPE.sub(lambda match: chr(int(match[1], 8)), mountpoint)
        if root:
            mountpoint = mountpoint.removeprefix(root) or "/"
        mounts[device, fstype, mountpoint] = Mount(device, fstype, mountpoint, "ro" in options.split(","))
    return list(mounts.values())


_LOCAL = ("tmpfs", "ramfs", "rootfs", "overlay", "zfs", "btrfs", "bcachefs", "efivarfs")
"""Types of filesystem that no server stands behind, though their device's name is no path below /dev."""
_THREADS = 16
_HIRE_AFTER = 0.02
"""Seconds after which one more thread takes a share of what is still to be asked."""


class _Question:
    """One statvfs call; `done` is set last, by the thread that made it. `hangs`: no scrape waits for it any more."""

    __slots__ = ("answer", "done", "hangs", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self.answer: Space | None = None
        self.done = self.hangs = False


class _Lane:
    """A queue of questions and the daemon threads that ask them; daemons, so that one that hangs cannot hold up an exit."""

    def __init__(self, statvfs: Callable[[str], os.statvfs_result]) -> None:
        self._statvfs = statvfs
        self._lock = threading.Lock()
        self._queue: deque[_Question] = deque()
        self._threads = 0

    def put(self, question: _Question) -> None:
        """Queue a question; `staff` sees to it that it is asked."""
        self._queue.append(question)

    def staff(self, loop: asyncio.AbstractEventLoop, when_done: Callable[[], object]) -> None:
        """Start one more thread if a question waits; it lives until none does, and then calls `when_done` in the loop."""
        with self._lock:
            if not self._queue or self._threads >= _THREADS:
                return
            self._threads += 1
        try:
            threading.Thread(target=self._work, args=(loop, when_done), name="statvfs", daemon=True).start()
        except RuntimeError:  # the system has no thread to spare; those that run carry on
            with self._lock:
                self._threads -= 1

    def _work(self, loop: asyncio.AbstractEventLoop, when_done: Callable[[], object]) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._threads -= 1
                    break
                question = self._queue.popleft()
            with contextlib.suppress(OSError, ValueError):
                question.answer = _space(self._statvfs(question.path))
            question.done = True
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(when_done)


def _space(said: os.statvfs_result) -> Space:
    # f_frsize, not f_bsize as node_exporter: they differ on FUSE alone, where only f_frsize is the unit of f_blocks.
    unit = said.f_frsize
    return Space(said.f_blocks * unit, said.f_bfree * unit, said.f_bavail * unit, said.f_files, said.f_ffree)
