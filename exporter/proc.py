"""/proc read directly: which process is whose child, and what one process uses. Linux; the files are those of proc(5).

Direct, because psutil takes 2.3 times the CPU: 12.8 ms for 100 Node apps, this 5.6 ms (bench/proc_read.py).
Never read are cmdline and smaps: they wait for a lock that a process in the middle of a page fault may hold for as long as
a dead disk or NFS server likes.
"""

import os
import resource
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class Stat(NamedTuple):
    """One line of /proc/PID/stat; CPU times in ticks. The kernel reuses a pid, but not with the same start."""

    state: bytes
    ppid: int
    user: int
    system: int
    reaped_user: int
    """Of all its descendants that ended and were waited for, by it or by those it waited for."""
    reaped_system: int
    threads: int
    start: int
    """Ticks since the machine started."""
    virtual: int
    """Bytes."""

    @property
    def is_zombie(self) -> bool:
        """Whether it has ended and waits for its parent to take note; its times are still there to be read."""
        return self.state == b"Z"


class Usage(NamedTuple):
    """What one process uses, beyond its Stat; None is "not ours to see"."""

    resident: int
    """Bytes, as are all sizes here."""
    swapped: int
    voluntary: int
    """Context switches of the main thread."""
    involuntary: int
    read: int | None
    """From storage, by it and by its descendants that ended and were waited for."""
    written: int | None
    open_fds: int | None
    max_fds: int | None
    """The soft limit; None also where there is none."""


class Proc:
    """One mounted proc file system.

    A process that ends while it is looked at is "not there"; errors of our own, such as no free descriptor, are raised as
    OSError, so that they are not taken for the end of the world's processes.
    """

    def __init__(self, root: Path = Path("/proc")) -> None:
        """Find out, once, whether the kernel tells how many descriptors are open (Linux 6.2), or they must be counted.

        And whether pids are here what they are to system calls, which they are not in another pid namespace.
        """
        self._root = str(root)
        self._fd_size = self._is_ours = False
        with suppress(OSError):
            self._fd_size = os.stat(f"{self._root}/self/fd").st_size > 0  # noqa: PTH116 -- as below
            self._is_ours = Path(self._root, "self").readlink() == Path(str(os.getpid()))

    def table(self) -> dict[int, Stat]:
        """Return every process that can be seen, by pid, in one pass; not those that their parent is just done with."""
        return self.stats(self.pids())

    def pids(self) -> dict[int, int]:
        """Return the pid of every process that can be seen, with the inode of its folder: the next process has another."""
        with os.scandir(self._root) as entries:
            return {int(entry.name): entry.inode() for entry in entries if entry.name.isdecimal()}

    def stats(self, pids: Iterable[int]) -> dict[int, Stat]:
        """Return those of these processes that are still there."""
        root, found = self._root, {}
        for pid in pids:
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                stat = _stat(_read(f"{root}/{pid}/stat", 1024))
                if stat.state != b"X":
                    found[pid] = stat
        return found

    def usage(self, pid: int) -> Usage | None:
        """Return what the process `pid` uses, or None if it is not there any more."""
        base = f"{self._root}/{pid}"
        try:
            status = _read(f"{base}/status", 8192)
            max_fds = self._max_fds(pid)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return None
        if status.find(b"\nState:\tX", 0, 256) > 0:
            return None
        io = b""
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            io = _read(f"{base}/io", 512)
        switches = status.rfind(b"\nvoluntary_ctxt_switches:")
        return Usage(
            resident=_number(status, b"\nVmRSS:") * 1024,
            swapped=_number(status, b"\nVmSwap:") * 1024,
            voluntary=_number(status, b"\nvoluntary_ctxt_switches:", switches),
            involuntary=_number(status, b"\nnonvoluntary_ctxt_switches:", switches),
            read=_number(io, b"\nread_bytes:") if io else None,
            written=_number(io, b"\nwrite_bytes:") if io else None,
            open_fds=self._open_fds(f"{base}/fd"),
            max_fds=max_fds,
        )

    def _max_fds(self, pid: int) -> int | None:
        if self._is_ours:
            with suppress(OSError):  # another user's cannot be asked for, but read
                soft, _ = resource.prlimit(pid, resource.RLIMIT_NOFILE)
                return soft if soft != resource.RLIM_INFINITY else None
        return _limit(_read(f"{self._root}/{pid}/limits", 4096), b"\nMax open files")

    def _open_fds(self, folder: str) -> int | None:
        try:
            if self._fd_size:
                return os.stat(folder).st_size  # noqa: PTH116 -- pathlib costs more than the system call
            with os.scandir(folder) as entries:
                return sum(1 for _ in entries)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return None


def trees(table: Mapping[int, Stat], roots: Iterable[int]) -> dict[int, list[int]]:
    """Return the processes of each root: itself and all below it, down to the next root. Pure; each process is in one tree.

    A root that is not in the table has no tree. The pass over /proc is no snapshot: should a reused pid make two processes
    each other's ancestors, they belong to nobody.
    """
    found: dict[int, list[int]] = {root: [] for root in roots if root in table}
    owner: dict[int, int] = {root: root for root in found}
    for pid in table:
        path, at = [], pid
        while at not in owner:
            owner[at] = 0
            path.append(at)
            if at not in table:
                break
            at = table[at].ppid
        root = owner[at]
        if root:
            for below in path:
                owner[below] = root
            found[root].append(pid)
    return found


def _read(path: str, size: int) -> bytes:
    """Return the whole file; in one call where it is shorter than `size`."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = part = os.read(fd, size)
        while len(part) == size:
            part = os.read(fd, size)
            data += part
        return data
    finally:
        os.close(fd)


def _stat(line: bytes) -> Stat:
    """Read the line from behind the command's name, which may hold anything, spaces, parentheses and line ends too."""
    field = line[line.rindex(b")") + 2 :].split(b" ", 21)
    return Stat(
        field[0],
        int(field[1]),
        int(field[11]),
        int(field[12]),
        int(field[13]),
        int(field[14]),
        int(field[17]),
        int(field[19]),
        int(field[20]),
    )


def _number(text: bytes, key: bytes, start: int = 0) -> int:
    """Return the number behind `key`, 0 where there is none: a process without memory of its own has no such line."""
    at = text.find(key, start)
    return int(text[at + len(key) : text.index(b"\n", at + 1)].removesuffix(b"kB")) if at >= 0 else 0


def _limit(text: bytes, key: bytes) -> int | None:
    at = text.find(key)
    soft = text[at + len(key) :].split(None, 1)[0] if at >= 0 else b"unlimited"
    return int(soft) if soft != b"unlimited" else None
