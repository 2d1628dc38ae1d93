"""A /proc made of files, for what no real process can be brought to do on demand."""

from pathlib import Path

import pytest


class FakeProc:
    """A folder that looks like /proc to a reader."""

    def __init__(self, root: Path) -> None:
        """Start without any process."""
        self.root = root

    def add(  # noqa: PLR0913 -- as many figures as a process has
        self,
        pid: int,
        ppid: int,
        *,
        comm: str = "node",
        state: str = "S",
        times: tuple[int, int, int, int] = (0, 0, 0, 0),
        start: int = 100,
        io: tuple[int, int] | None = (0, 0),
        fds: int = 3,
        limit: str = "1024",
    ) -> None:
        """Write the files of one process, or write them anew."""
        folder = self.root / str(pid)
        (folder / "fd").mkdir(parents=True, exist_ok=True)
        before = f"{pid} ({comm}) {state} {ppid} {pid} {pid} 0 -1 4194304 2155 0 0 0"
        behind = (
            f"20 0 11 0 {start} 745713664 10050 18446744073709551615 1 1 0 0 0 0 0 16781312 17922 0 0 0 17 0 0 0 0 0 0\n"
        )
        (folder / "stat").write_text(f"{before} {' '.join(map(str, times))} {behind}")
        vm = "" if state in "ZX" else "VmSize:\t  728236 kB\nVmRSS:\t   40324 kB\nVmSwap:\t      12 kB\n"
        (folder / "status").write_text(
            f"Name:\t{comm[:15]!r}\nUmask:\t0022\nState:\t{state} (whatever)\nPid:\t{pid}\n{vm}Threads:\t11\n"
            "voluntary_ctxt_switches:\t40\nnonvoluntary_ctxt_switches:\t6\n"
        )
        (folder / "limits").write_text(
            "Limit                     Soft Limit           Hard Limit           Units     \n"
            f"Max open files            {limit:<20} 1048576              files     \n"
            "Max locked memory         8388608              8388608              bytes     \n"
        )
        (folder / "io").unlink(missing_ok=True)
        if io is not None:
            (folder / "io").write_text(
                f"rchar: 1\nwchar: 2\nread_bytes: {io[0]}\nwrite_bytes: {io[1]}\ncancelled_write_bytes: 0\n"
            )
        for number in range(fds):
            (folder / "fd" / str(number)).touch()

    def remove(self, pid: int) -> None:
        """Take a process away."""
        folder = self.root / str(pid)
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()


@pytest.fixture
def fake(tmp_path: Path) -> FakeProc:
    """Return an empty /proc."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").touch()
    return FakeProc(tmp_path / "proc")
