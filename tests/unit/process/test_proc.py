"""Reading /proc, and which process belongs to which tree."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.proc import Proc, Stat, Usage, trees

if TYPE_CHECKING:
    from tests.unit.process.conftest import FakeProc


def stat(ppid: int) -> Stat:
    """Return the line of an idle process."""
    return Stat(b"S", ppid, 0, 0, 0, 0, 1, 100, 0)


@pytest.mark.parametrize(
    "comm", ["node", "npm run (x) S 1 2", "a) R 9 (b", ") ) )", "line\nend) Z 7", "", "(", "tmux: server", "\N{SNOWMAN}"]
)
def test_a_command_name_never_shifts_the_fields(fake: "FakeProc", comm: str) -> None:
    """The name in /proc/PID/stat may hold spaces, parentheses and line ends, and the fields behind it stay the same."""
    fake.add(7, 3, comm=comm, times=(11, 12, 13, 14), start=99)
    assert Proc(fake.root).table() == {7: Stat(b"S", 3, 11, 12, 13, 14, 11, 99, 745713664)}


def test_the_table_leaves_out_whom_its_parent_has_just_waited_for(fake: "FakeProc") -> None:
    """A process in state X is already in its parent's counts; a zombie is not yet."""
    fake.add(7, 3, state="X")
    fake.add(8, 3, state="Z")
    table = Proc(fake.root).table()
    assert list(table) == [8]
    assert table[8].is_zombie


def test_the_table_leaves_out_what_vanishes_meanwhile(fake: "FakeProc") -> None:
    """A process that ends between the listing and the reading is not there, and hides no other."""
    fake.add(7, 3)
    (fake.root / "8").mkdir()
    assert list(Proc(fake.root).table()) == [7]


def test_an_error_of_our_own_is_no_end_of_processes(fake: "FakeProc") -> None:
    """What is neither gone nor forbidden is raised, lest the death of all be counted."""
    fake.add(7, 3)
    (fake.root / "8" / "stat").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        Proc(fake.root).table()
    (fake.root / "7" / "status").unlink()
    (fake.root / "7" / "status").mkdir()
    with pytest.raises(IsADirectoryError):
        Proc(fake.root).usage(7)


def test_usage_reads_every_figure(fake: "FakeProc") -> None:
    """Sizes are in bytes, descriptors are counted where the kernel does not tell, the limit is the soft one."""
    fake.add(7, 3, io=(4096, 8192), fds=5, limit="256")
    assert Proc(fake.root).usage(7) == Usage(
        resident=40324 * 1024,
        swapped=12 * 1024,
        voluntary=40,
        involuntary=6,
        read=4096,
        written=8192,
        open_fds=5,
        max_fds=256,
    )


def test_usage_of_the_gone_is_none(fake: "FakeProc") -> None:
    """A process that is gone, or that its parent is done with, has no usage."""
    fake.add(8, 3, state="X")
    assert Proc(fake.root).usage(7) is None
    assert Proc(fake.root).usage(8) is None


def test_a_zombie_uses_nothing_but_has_its_counts(fake: "FakeProc") -> None:
    """A zombie has no memory of its own; its context switches are still told."""
    fake.add(7, 3, state="Z", fds=0)
    usage = Proc(fake.root).usage(7)
    assert usage is not None
    assert (usage.resident, usage.swapped, usage.voluntary, usage.open_fds) == (0, 0, 40, 0)


def test_hidden_io_costs_nothing_else(fake: "FakeProc") -> None:
    """Where the I/O is not to be seen, all else is."""
    fake.add(7, 3, io=None)
    usage = Proc(fake.root).usage(7)
    assert usage is not None
    assert (usage.read, usage.written, usage.open_fds) == (None, None, 3)


def test_no_limit_is_none(fake: "FakeProc") -> None:
    """A limit that is none is no number."""
    fake.add(7, 3, limit="unlimited")
    usage = Proc(fake.root).usage(7)
    assert usage is not None
    assert usage.max_fds is None


def test_a_file_longer_than_the_first_read_is_read_to_its_end(fake: "FakeProc") -> None:
    """A user in thousands of groups has a long status file, with the memory behind the groups."""
    fake.add(7, 3)
    path = fake.root / "7" / "status"
    path.write_text(
        path.read_text().replace("VmSize", "Groups:\t" + " ".join(map(str, range(100_000, 103_000))) + "\nVmSize")
    )
    usage = Proc(fake.root).usage(7)
    assert usage is not None
    assert (usage.resident, usage.voluntary) == (40324 * 1024, 40)


def test_the_real_proc_tells_its_descriptors_as_counted() -> None:
    """Both ways of counting descriptors agree on a process with thousands of them."""
    import os  # noqa: PLC0415 -- only here

    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(500)]
    try:
        usage = Proc().usage(os.getpid())
        assert usage is not None
        listed = len(os.listdir(f"/proc/{os.getpid()}/fd")) - 1  # noqa: PTH208 -- less the one that lists
        assert usage.open_fds == listed
        assert usage.open_fds > 500
    finally:
        for fd in opened:
            os.close(fd)


def test_a_tree_is_cut_at_the_next_root() -> None:
    """What is below another app's root is that app's, and the parent of roots is nobody's."""
    table = {2: stat(1), 10: stat(2), 11: stat(10), 12: stat(11), 13: stat(12), 20: stat(2), 21: stat(20), 30: stat(1)}
    assert trees(table, [10, 12, 20]) == {10: [10, 11], 12: [12, 13], 20: [20, 21]}


def test_a_root_that_is_not_there_has_no_tree() -> None:
    """A process that PM2 lists and /proc does not show has no tree, and its children are not guessed."""
    assert trees({11: stat(10)}, [10]) == {}


def parents() -> st.SearchStrategy[dict[int, int]]:
    """Return any map from pid to parent, loops and absent parents too."""
    return st.dictionaries(st.integers(1, 40), st.integers(0, 45), max_size=40)


@given(parents(), st.sets(st.integers(1, 45), max_size=12))
def test_every_process_is_in_the_tree_of_the_nearest_root_above_it(parents: Mapping[int, int], roots: set[int]) -> None:
    """Trees never overlap, and membership is exactly: the first root met on the way up, itself first."""
    found = trees({pid: stat(ppid) for pid, ppid in parents.items()}, roots)
    members = [pid for tree in found.values() for pid in tree]
    assert len(members) == len(set(members))
    for pid in parents:
        at, seen = pid, set()
        while at in parents and at not in seen and at not in roots:
            seen.add(at)
            at = parents[at]
        owner = at if at in roots and at in parents else None
        assert [root for root, tree in found.items() if pid in tree] == ([] if owner is None else [owner])


@pytest.mark.parametrize("root", [Path("/nonexistent")])
def test_without_proc_there_is_an_error(root: Path) -> None:
    """A machine without /proc is told apart from one without processes."""
    with pytest.raises(FileNotFoundError):
        Proc(root).table()
