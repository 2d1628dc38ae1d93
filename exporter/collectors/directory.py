"""Directories that fill disks (logs, caches, backups): bytes, files, and the age of the oldest one.

Directories are scanned in the background, one after the other, in a daemon thread; a scrape shows what the last scan found
and when that was. A scan follows no link below its root, stays on the root's filesystem unless told otherwise, pauses every
few files, and ends at a budget of entries or seconds: then its figures are lower bounds and
`pm2_directory_scan_complete` is 0.
A scan that hangs (a dead network filesystem) delays its neighbours once, by its budget of seconds and a grace; it is left
alone until it comes back, and meanwhile the time of the last scan stands still and `pm2_directory_scan_complete` is 0.

Bytes are those allocated on the disk, as du counts: what removing the files would free. A sparse log file can claim a
thousand times as many. Directories themselves are not counted, and a file with several hard links counts once.
"""

import asyncio
import contextlib
import fnmatch
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from exporter.exposition import Desc, Metric, gauge
from exporter.grammar import Duration, Strict, default

_LABELS = ("path",)
_EXISTS = gauge(
    "pm2_directory_exists",
    "1 if the path is a directory, 0 if there is none; absent where it may not be looked at.",
    _LABELS,
    source="the last scan",
)
_BYTES = gauge(
    "pm2_directory_bytes",
    "Bytes that the directory's files occupy on the disk.",
    _LABELS,
    source="the last scan: st_blocks",
)
_FILES = gauge("pm2_directory_files", "Regular files in the directory and below.", _LABELS, source="the last scan")
_OLDEST = gauge(
    "pm2_directory_oldest_file_timestamp_seconds",
    "When the file that is unchanged for longest was last changed, as Unix time.",
    _LABELS,
    source="the last scan: st_mtime",
)
_UNREADABLE = gauge(
    "pm2_directory_unreadable_entries",
    "Files and directories that could not be looked at; what they hold is not counted.",
    _LABELS,
    source="the last scan",
)
_SCANNED = gauge(
    "pm2_directory_scan_timestamp_seconds", "When the last scan ended, as Unix time.", _LABELS, source="the last scan"
)
_DURATION = gauge("pm2_directory_scan_duration_seconds", "How long the last scan took.", _LABELS, source="the last scan")
_COMPLETE = gauge(
    "pm2_directory_scan_complete",
    "0 if the last scan was cut short by its budget, or one is hanging; the figures are then lower bounds or old.",
    _LABELS,
    source="the last scan",
)

DESCS: tuple[Desc, ...] = (_EXISTS, _BYTES, _FILES, _OLDEST, _UNREADABLE, _SCANNED, _DURATION, _COMPLETE)


class DirectoryPath(Strict, frozen=True, kw_only=True):
    """One directory to measure."""

    path: str
    """The directory; absolute, or below the home directory as "~/...". It may itself be a link to a directory."""
    match: str = "*"
    """Which files count, by name, as a shell pattern: "*.log*". Default "*": all."""
    one_file_system: bool = True
    """Whether filesystems that are mounted below the directory are left out, as with `du -x`. Default true."""

    def __post_init__(self) -> None:
        """Hold the rules of a path and of a pattern."""
        if not self.path.startswith(("/", "~/")) or "\0" in self.path:
            raise ValueError(f"path must be absolute or start with ~/, got {self.path!r}")
        if "/" in self.match or not self.match:
            raise ValueError(f"match is a pattern for names, without a slash, got {self.match!r}")

    def where(self) -> Path:
        """Return the path with the home directory filled in, where there is one."""
        return Path(os.path.normpath(os.path.expanduser(self.path)))  # noqa: PTH111 -- Path's raises where there is no home


class DirectoryOptions(Strict, frozen=True, kw_only=True):
    """Directories whose size matters (`pm2_directory_*`), scanned in the background."""

    paths: tuple[DirectoryPath, ...] = ()
    """The directories; each path once."""
    interval: Duration = default(Duration(300))
    """Time from the start of one round of scans to the start of the next, at least 1s. Default 5m."""
    max_entries: Annotated[int, msgspec.Meta(ge=1)] = 200_000
    """Entries (files, directories and all else) after which the scan of a directory is cut short. Default 200000."""
    max_duration: Duration = default(Duration(60))
    """Time after which the scan of a directory is cut short. Default 1m."""

    def __post_init__(self) -> None:
        """Hold the rules that no path comes twice and that times are positive."""
        seen: dict[Path, str] = {}
        for path in self.paths:
            if (where := path.where()) in seen:
                raise ValueError(f"paths: {path.path!r} is there twice (as {seen[where]!r})")
            seen[where] = path.path
        if self.interval < 1:
            raise ValueError("interval must be at least 1s")
        if self.max_duration <= 0:
            raise ValueError("max_duration must be more than 0")


class Scan(NamedTuple):
    """What one scan found; None where it could not see. `at` is Unix time, the rest seconds and bytes."""

    at: float
    duration: float
    exists: bool | None
    complete: bool = True
    unreadable: int = 0
    bytes: int | None = None
    files: int | None = None
    oldest: float | None = None


class Directory(NamedTuple):
    """One configured directory: its last scan, if there was one, and whether a scan is hanging."""

    path: str
    scan: Scan | None
    hangs: bool


_GRACE = 5.0
"""Seconds beyond its budget after which a scan counts as hanging: it looks at the clock only between entries."""


class DirectoryCollector:
    """Shows the last scan of each directory, and scans."""

    descs = DESCS

    def __init__(
        self, options: DirectoryOptions, scan: Callable[..., Scan] | None = None, *, grace: float = _GRACE
    ) -> None:
        """Scan the directories of `options` through `scan`; one that is `grace` seconds over its budget hangs."""
        self._options, self._grace = options, grace
        self._scan = scan or scan_directory
        self._scans: dict[str, Scan] = {}
        self._under_way: set[str] = set()
        self._hanging: set[str] = set()
        self._stop = threading.Event()
        self._in_background = False

    async def run(self) -> None:
        """Scan each directory at once, and again at every interval."""
        loop = asyncio.get_running_loop()
        self._in_background = True
        self._stop = threading.Event()
        try:
            while True:
                start = loop.time()
                for path in self._options.paths:
                    await self._look(path, self._options.max_duration, self._options.max_duration + self._grace)
                await asyncio.sleep(max(1.0, start + self._options.interval - loop.time()))
        finally:
            self._in_background = False
            self._stop.set()

    async def read(self, within: float) -> Sequence[Directory]:
        """Return the last scans; while `run` works, at once.

        Where it does not (a single scrape, then the end), the first read scans by itself: each directory for as long as is
        left of `within`, so that the last ones may have nothing to show.
        """
        if not self._in_background and not self._scans:
            loop = asyncio.get_running_loop()
            deadline = loop.time() + within
            for path in self._options.paths:
                left = deadline - loop.time()
                if left > 0:
                    # A tenth is for the thread's way back.
                    await self._look(path, min(self._options.max_duration, left * 0.9), left)
        return [
            Directory(path.path, self._scans.get(path.path), path.path in self._hanging) for path in self._options.paths
        ]

    def metrics(self, seen: Sequence[Directory]) -> Iterable[Metric]:
        """Turn what was seen into metrics. Pure."""
        scans = [((directory.path,), directory.scan) for directory in seen if directory.scan]
        yield Metric(_EXISTS, [(path, None if scan.exists is None else int(scan.exists)) for path, scan in scans])
        yield Metric(_BYTES, [(path, scan.bytes) for path, scan in scans])
        yield Metric(_FILES, [(path, scan.files) for path, scan in scans])
        yield Metric(_OLDEST, [(path, scan.oldest) for path, scan in scans])
        yield Metric(_UNREADABLE, [(path, scan.unreadable) for path, scan in scans])
        yield Metric(_SCANNED, [(path, scan.at) for path, scan in scans])
        yield Metric(_DURATION, [(path, scan.duration) for path, scan in scans])
        yield Metric(_COMPLETE, list(_completeness(seen)))

    async def _look(self, path: DirectoryPath, seconds: float, patience: float) -> None:
        """Have a thread scan `path` for `seconds`; wait for it for `patience`."""
        if path.path in self._under_way:
            return
        loop = asyncio.get_running_loop()
        scanned: asyncio.Future[None] = loop.create_future()
        stop = self._stop

        def work() -> None:
            try:
                found: Scan | Exception = self._scan(
                    path, max_entries=self._options.max_entries, max_seconds=seconds, stop=stop
                )
            except Exception as error:  # noqa: BLE001 -- whatever it is, it belongs to whoever waits
                found = error
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self._take, path.path, found, scanned)

        try:
            threading.Thread(target=work, name="scan", daemon=True).start()
        except RuntimeError:  # the system has no thread to spare; the next round tries again
            return
        self._under_way.add(path.path)
        try:
            done, _ = await asyncio.wait((scanned,), timeout=patience)
            if done:
                scanned.result()
            else:
                self._hanging.add(path.path)
        finally:
            scanned.cancel()

    def _take(self, path: str, found: Scan | Exception, scanned: asyncio.Future[None]) -> None:
        self._under_way.discard(path)
        self._hanging.discard(path)
        if isinstance(found, Scan):
            self._scans[path] = found
        if scanned.cancelled():
            return
        if isinstance(found, Exception):
            scanned.set_exception(found)
        else:
            scanned.set_result(None)


def _completeness(seen: Sequence[Directory]) -> Iterator[tuple[tuple[str, ...], int]]:
    for directory in seen:
        if directory.hangs:
            yield (directory.path,), 0
        elif directory.scan:
            yield (directory.path,), int(directory.scan.complete)


_PAUSE_EVERY = 256
_PAUSE = 0.002
"""Seconds; a pause every so many entries leaves disk and interpreter to others for about half of the time."""
_BLOCK = 512
"""Bytes; the unit of st_blocks, whatever the filesystem's own."""
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def scan_directory(path: DirectoryPath, *, max_entries: int, max_seconds: float, stop: threading.Event) -> Scan:
    """Measure one directory, until the budget is spent or `stop` is set. Blocks; raises nothing for what a disk may do."""
    start = time.monotonic()
    root = path.where()
    walk = _Walk(path, max_entries, start + max_seconds, stop)
    exists: bool | None = True
    complete, looked_inside = True, False
    try:
        complete = walk.measure(str(root))
        looked_inside = True
    except (FileNotFoundError, NotADirectoryError):
        exists = False
    except OSError:
        exists = _is_directory(root)
        walk.unreadable += 1
    return Scan(
        at=time.time(),
        duration=time.monotonic() - start,
        exists=exists,
        complete=complete,
        unreadable=walk.unreadable,
        bytes=walk.bytes if looked_inside else None,
        files=walk.files if looked_inside else None,
        oldest=walk.oldest,
    )


def _is_directory(path: Path) -> bool | None:
    """Tell what stat(2) knows of a directory that may not be read; None: not even that."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError:
        return None


class _SpentError(Exception):
    """The budget is spent, or the scan is to stop."""


class _Walk:
    """One walk through a tree, and what it has counted so far."""

    def __init__(self, path: DirectoryPath, max_entries: int, end: float, stop: threading.Event) -> None:
        self.bytes = self.files = self.unreadable = 0
        self.oldest: float | None = None
        self._matches = None if path.match == "*" else re.compile(fnmatch.translate(path.match)).match
        self._one_file_system = path.one_file_system
        self._entries_left, self._end, self._stop = max_entries, end, stop
        self._seen: set[tuple[int, int]] = set()

    def measure(self, root: str) -> bool:
        """Walk; say whether all was seen. Raises OSError where the root itself cannot be read."""
        try:
            pending, device = self._directory(root, os.open(root, _OPEN), None)
            while pending:
                directory = pending.pop()
                try:
                    descriptor = os.open(directory, _OPEN | os.O_NOFOLLOW)
                    pending += self._directory(directory, descriptor, device)[0]
                except (FileNotFoundError, NotADirectoryError):
                    continue  # it was there a moment ago
                except OSError:
                    self.unreadable += 1
        except _SpentError:
            return False
        return True

    def _directory(self, path: str, descriptor: int, device: int | None) -> tuple[list[str], int]:
        """Count the files of an open directory, and close it; return the directories in it and the device it is on."""
        try:
            self._spend(0)
            status = os.fstat(descriptor)
            below: list[str] = []
            strange = self._one_file_system and device not in (None, status.st_dev)
            if not strange and self._first_time(status):
                with os.scandir(descriptor) as entries:
                    for entry in entries:
                        self._spend(1)
                        try:
                            if entry.is_dir(follow_symlinks=False):
                                below.append(f"{path}/{entry.name}")
                            else:
                                self._file(entry)
                        except FileNotFoundError:
                            continue
                        except OSError:
                            self.unreadable += 1
            return below, status.st_dev
        finally:
            os.close(descriptor)

    def _file(self, entry: os.DirEntry[str]) -> None:
        if entry.is_symlink() or (self._matches and not self._matches(entry.name)):
            return
        status = entry.stat(follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode) or (status.st_nlink > 1 and not self._first_time(status)):
            return
        self.files += 1
        self.bytes += status.st_blocks * _BLOCK
        if self.oldest is None or status.st_mtime < self.oldest:
            self.oldest = status.st_mtime

    def _first_time(self, status: os.stat_result) -> bool:
        key = status.st_dev, status.st_ino
        if key in self._seen:
            return False
        self._seen.add(key)
        return True

    def _spend(self, entries: int) -> None:
        self._entries_left -= entries
        if self._entries_left < 0 or time.monotonic() > self._end:
            raise _SpentError
        if entries and self._entries_left % _PAUSE_EVERY == 0 and self._stop.wait(_PAUSE):
            raise _SpentError
