"""The running totals, against a kernel of which the truth is known."""

from collections.abc import Callable, Iterator
from contextlib import suppress

from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.collectors.process import App, Counts, Ledger, Tree, UnseenError, look
from exporter.pm2.process import Listing, Process
from exporter.proc import Stat, Usage

INIT, DAEMON = 1, 2
Step = tuple[str, int, int]


class Task:
    """A process of the kernel below."""

    def __init__(self, ppid: int, start: int) -> None:
        """Be born."""
        self.ppid, self.start = ppid, start
        self.own = self.reaped = 0
        self.state = b"S"
        self.ignores_children = self.is_subreaper = self.hides_io = False


class Kernel:
    """What a kernel does to processes' times, and the truth it never tells: what each app used, and what of it was lost."""

    def __init__(self, apps: int) -> None:
        """Boot, with PM2 and its apps running and nothing used yet; pids are reused soon, also ones below the parent's."""
        self.clock = 0
        self.tasks = {INIT: Task(0, 0), DAEMON: Task(INIT, 0)}
        self.next = 3
        self.roots = {("app", str(number)): self.fork(DAEMON) for number in range(apps)}
        self.used = dict.fromkeys(self.roots, 0)
        self.lost = dict.fromkeys(self.roots, 0)
        self.hid_io = False

    def fork(self, ppid: int) -> int:
        """Return the new child's pid."""
        self.clock += 1
        while self.next in self.tasks:
            self.next = 3 + (self.next - 2) % 10
        pid, self.next = self.next, 3 + (self.next - 2) % 10
        self.tasks[pid] = Task(ppid, self.clock)
        return pid

    def app(self, pid: int) -> App | None:
        """Return whose tree a process is in."""
        by_root = {root: app for app, root in self.roots.items()}
        while pid in self.tasks:
            if pid in by_root:
                return by_root[pid]
            pid = self.tasks[pid].ppid
        return None

    def step(self, step: Step) -> None:
        """Let one thing happen to one of the apps' living processes."""
        kind, index, amount = step
        alive = sorted(pid for pid, task in self.tasks.items() if task.state == b"S" and self.app(pid))
        if kind == "restart":
            app = sorted(self.roots)[index % len(self.roots)]
            if self.roots[app] in self.tasks:
                self.exit(self.roots[app])
            self.roots[app] = self.fork(DAEMON)
        elif alive:
            pid = alive[index % len(alive)]
            {
                "burn": lambda: self.burn(pid, amount),
                "fork": lambda: self.fork(pid) if len(self.tasks) < 9 else None,
                "exit": lambda: self.exit(pid),
                "end": lambda: self.end(pid),
                "wait": lambda: self.wait(pid),
                "release": self.release,
                "ignore": lambda: setattr(self.tasks[pid], "ignores_children", True),
                "hide": lambda: self.hide(pid),
                "subreap": lambda: setattr(self.tasks[pid], "is_subreaper", True),
            }[kind]()

    def hide(self, pid: int) -> None:
        """Take on rights that forbid others to see the I/O, or lay them down."""
        self.tasks[pid].hides_io = not self.tasks[pid].hides_io
        self.hid_io = True

    def burn(self, pid: int, amount: int) -> None:
        """Use CPU time."""
        self.tasks[pid].own += amount
        app = self.app(pid)
        if app:
            self.used[app] += amount

    def exit(self, pid: int) -> None:
        """End; children get another parent, and the parent may wait, or not care, or never come to it."""
        task = self.tasks[pid]
        for child, other in list(self.tasks.items()):
            if other.ppid == pid:
                self.adopt(child, task)
        parent = self.tasks[task.ppid]
        task.state = b"Z"
        if task.ppid in (INIT, DAEMON) or parent.ignores_children:
            self.lose(pid)
            del self.tasks[pid]

    def end(self, pid: int) -> None:
        """End as a well-kept process does: not as an app's root, and with no child left."""
        if pid not in self.roots.values() and all(task.ppid != pid for task in self.tasks.values()):
            self.exit(pid)

    def adopt(self, child: int, dying: Task) -> None:
        """Give an orphan to the nearest subreaper above, else to init; what leaves the tree takes its times with it."""
        heir = dying.ppid
        while heir != INIT and not self.tasks[heir].is_subreaper:
            heir = self.tasks[heir].ppid
        if heir == INIT:
            below = [pid for pid in self.tasks if self.descends(pid, child)]
            for pid in below:
                self.lose(pid)
        self.tasks[child].ppid = heir
        if self.tasks[child].state != b"S" and (heir == INIT or self.tasks[heir].ignores_children):
            if heir != INIT:
                self.lose(child)
            del self.tasks[child]

    def descends(self, pid: int, ancestor: int) -> bool:
        """Tell whether a process is `ancestor` or below it."""
        while pid in self.tasks:
            if pid == ancestor:
                return True
            pid = self.tasks[pid].ppid
        return False

    def lose(self, pid: int) -> None:
        """Note that what a process used will be in no ancestor's times."""
        app = self.app(pid)
        task = self.tasks[pid]
        if app and task.state != b"X":
            self.lost[app] += task.own + task.reaped

    def wait(self, pid: int) -> None:
        """Wait for one zombie: its times are added before it vanishes, and for a moment both can be seen."""
        for task in self.tasks.values():
            if task.ppid == pid and task.state == b"Z":
                task.state = b"X"
                self.tasks[pid].reaped += task.own + task.reaped
                return

    def release(self) -> None:
        """Let those who were waited for vanish."""
        for pid in [pid for pid, task in self.tasks.items() if task.state == b"X"]:
            del self.tasks[pid]

    def table(self, meanwhile: Callable[[], None]) -> dict[int, Stat]:
        """Read every process, one by one, while life goes on."""
        found = {}
        for pid in sorted(self.tasks):
            meanwhile()
            task = self.tasks.get(pid)
            if task and task.state != b"X":
                found[pid] = Stat(task.state, task.ppid, task.own, 0, task.reaped, 0, 1, task.start, 0)
        return found

    def usage(self, pid: int) -> Usage | None:
        """Read the rest of one process."""
        task = self.tasks.get(pid)
        if task is None or task.state == b"X":
            return None
        everything = None if task.hides_io else task.own + task.reaped
        return Usage(0, 0, task.own, 0, everything, everything, 0, 1024)

    def listing(self) -> Listing:
        """Return PM2's list."""
        return Listing(
            processes=tuple(
                Process(name=name, pm_id=int(pm_id), pid=root if root in self.tasks else 0)
                for (name, pm_id), root in self.roots.items()
            )
        )

    def look(self, ledger: Ledger, meanwhile: Callable[[], None] = lambda: None) -> tuple[Tree, ...]:
        """Look once, as the collector does."""

        def usage(pid: int) -> Usage | None:
            meanwhile()
            return self.usage(pid)

        table = self.table(meanwhile)
        with suppress(UnseenError):
            return look(self.listing(), table, usage, ledger)
        return ()


KINDS = (
    ["burn"] * 6 + ["fork"] * 4 + ["exit"] * 2 + ["wait"] * 4 + ["release"] * 2 + ["ignore", "subreap", "restart", "hide"]
)


def steps(kinds: list[str]) -> st.SearchStrategy[list[Step]]:
    """Return any life of the apps."""
    return st.lists(st.tuples(st.sampled_from(kinds), st.integers(0, 9), st.integers(1, 100)), max_size=150)


PACE = st.lists(st.sampled_from([0, 0, 0, 1, 1, 2, 5]), min_size=1, max_size=30)
"""How many things happen before each read, in turn."""


def live(kernel: Kernel, life: list[Step], pace: list[int], ledger: Ledger) -> Iterator[tuple[Tree, ...]]:
    """Look again and again while `life` goes on between and during the looks, and twice more when it is over."""
    todo, turn = iter(life), 0
    over = False

    def meanwhile() -> None:
        nonlocal turn, over
        for _ in range(pace[turn % len(pace)]):
            step = next(todo, None)
            if step is None:
                over = True
                return
            kernel.step(step)
        turn += 1

    yield kernel.look(ledger)
    while not over:
        yield kernel.look(ledger, meanwhile)
        meanwhile()
        if not any(pace):
            break
    kernel.release()
    yield kernel.look(ledger)
    yield kernel.look(ledger)


def totals(trees: tuple[Tree, ...]) -> dict[App, Counts]:
    """Return the totals seen."""
    return {tree.app: tree.totals for tree in trees if tree.totals is not None}


@settings(max_examples=1000, deadline=None)
@given(steps(KINDS), PACE, st.integers(1, 3))
def test_totals_never_shrink_nor_exceed_the_truth_nor_fall_far_behind(life: list[Step], pace: list[int], apps: int) -> None:
    """Whatever is born, dies, is waited for, orphaned, ignored, restarted or gets a used pid, at any moment of a look.

    CPU and I/O grow with every look or stay, are never more than what was used, and lack at the end at most what those
    had used that nobody waited for.
    """
    kernel, ledger = Kernel(apps), Ledger()
    before: dict[App, Counts] = {}
    for trees in live(kernel, life, pace, ledger):
        now = totals(trees)
        for app, counts in now.items():
            then = before.get(app, (0, 0, 0, 0, 0, 0))
            assert all(a >= b for a, b in zip(counts, then, strict=True)), "ran backwards"
            assert counts[0] <= kernel.used[app], "CPU time that nobody used"
            assert counts[2] <= kernel.used[app], "context switches that never were"
            assert counts[4] <= kernel.used[app], "I/O that nobody did"
        before = {**before, **now}
    for app, counts in before.items():
        assert counts[0] >= kernel.used[app] - kernel.lost[app]
        assert counts[4] >= kernel.used[app] - kernel.lost[app] or kernel.hid_io


@settings(max_examples=400, deadline=None)
@given(steps(["burn", "burn", "fork", "fork", "end", "wait", "wait", "release"]), PACE, st.integers(1, 3))
def test_where_every_child_is_waited_for_nothing_is_missing(life: list[Step], pace: list[int], apps: int) -> None:
    """Children that live and die between two looks, or during one, count to the last tick once the looks have caught up."""
    kernel, ledger = Kernel(apps), Ledger()
    *_, seen = live(kernel, life, pace, ledger)
    assert {app: counts[0] for app, counts in totals(seen).items()} == kernel.used
    assert {app: counts[4] for app, counts in totals(seen).items()} == kernel.used


def family() -> tuple[Kernel, Ledger, int, int]:
    """Return an app of which a child has used 100, all of it looked at; and the pids of both."""
    kernel, ledger = Kernel(1), Ledger()
    kernel.look(ledger)
    root = kernel.roots[APP]
    child = kernel.fork(root)
    kernel.burn(child, 100)
    kernel.look(ledger)
    return kernel, ledger, root, child


APP = ("app", "0")


def used(trees: tuple[Tree, ...]) -> int:
    """Return the CPU ticks counted for the only app."""
    return totals(trees)[APP][0]


def at_read(number: int, act: Callable[[], None]) -> Callable[[], None]:
    """Return what happens meanwhile: `act`, once, just before the read of that number."""
    reads = iter(range(100))
    return lambda: act() if next(reads) == number else None


def test_a_child_waited_for_at_any_moment_of_a_look_counts_once() -> None:
    """Before, between and after the reads of its parent and of itself, and in the moment when both show its times."""
    for moment in range(6):
        for vanishes in (True, False):
            kernel, ledger, root, child = family()

            def die(kernel: Kernel = kernel, root: int = root, child: int = child, vanishes: bool = vanishes) -> None:  # noqa: FBT001
                kernel.burn(child, 5)
                kernel.exit(child)
                kernel.wait(root)
                if vanishes:
                    kernel.release()

            assert used(kernel.look(ledger, at_read(moment, die))) <= 105
            kernel.release()
            assert used(kernel.look(ledger)) == 105
            assert used(kernel.look(ledger)) == 105


def test_a_whole_family_that_ends_between_two_looks_counts_once() -> None:
    """What a grandchild used comes up through a child that is gone as well."""
    kernel, ledger, root, child = family()
    grandchild = kernel.fork(child)
    kernel.burn(grandchild, 40)
    assert used(kernel.look(ledger)) == 140
    kernel.burn(grandchild, 1)
    kernel.exit(grandchild)
    kernel.wait(child)
    kernel.burn(child, 2)
    kernel.exit(child)
    kernel.wait(root)
    kernel.release()
    assert used(kernel.look(ledger)) == 143


def test_a_used_pid_is_another_process() -> None:
    """A new process with a dead one's pid starts from nothing, and the dead one is still accounted for."""
    kernel, ledger, root, child = family()
    kernel.exit(child)
    kernel.wait(root)
    kernel.release()
    kernel.next = child
    assert kernel.fork(root) == child
    kernel.burn(child, 60)
    assert used(kernel.look(ledger)) == 160


def test_the_usage_of_an_unwaited_child_stays_and_hides_others_only_briefly() -> None:
    """A parent that ignores SIGCHLD never gets its children's times; what is owed for them is forgotten after two looks."""
    kernel, ledger, root, child = family()
    kernel.tasks[root].ignores_children = True
    kernel.exit(child)
    another = kernel.fork(root)
    kernel.burn(another, 1)
    assert used(kernel.look(ledger)) == 101
    kernel.exit(another)
    assert used(kernel.look(ledger)) == 101
    kernel.tasks[root].ignores_children = False
    brief = kernel.fork(root)
    kernel.burn(brief, 30)
    kernel.exit(brief)
    kernel.wait(root)
    kernel.release()
    assert used(kernel.look(ledger)) == 101 + 30 - 1


def test_a_child_that_hides_its_io_and_ends_counts_once() -> None:
    """What was seen of a process's I/O before it was hidden is not counted again when it comes up through the parent."""
    kernel, ledger, root, child = family()
    kernel.hide(child)
    kernel.look(ledger)
    kernel.burn(child, 5)
    kernel.exit(child)
    kernel.wait(root)
    kernel.release()
    assert totals(kernel.look(ledger))[APP][4:] == (105, 105)


def test_an_orphan_that_lives_on_elsewhere_hides_nothing() -> None:
    """Nobody is paid for a process that left the tree alive: what its relatives used meanwhile counts in full."""
    kernel, ledger, root, child = family()
    grandchild = kernel.fork(child)
    kernel.burn(grandchild, 1000)
    assert used(kernel.look(ledger)) == 1100
    kernel.exit(child)
    kernel.wait(root)
    brief = kernel.fork(root)
    kernel.burn(brief, 30)
    kernel.exit(brief)
    kernel.wait(root)
    kernel.release()
    assert grandchild in kernel.tasks
    assert used(kernel.look(ledger)) == 1130


def test_a_restart_goes_on_from_where_the_app_was() -> None:
    """The new process of an app adds to what the old one was seen to use, I/O too, and none of it is hidden."""
    kernel, ledger, root, _ = family()
    kernel.burn(root, 11)
    assert totals(kernel.look(ledger))[APP][:5:4] == (111, 111)
    kernel.step(("restart", 0, 0))
    kernel.burn(kernel.roots[APP], 7)
    assert totals(kernel.look(ledger))[APP][:5:4] == (118, 118)


def test_what_was_used_before_the_first_look_does_not_count() -> None:
    """An exporter that starts anew starts at 0: how far its predecessor was is unknown, and a jump looks like a burst."""
    kernel, _, root, child = family()
    ledger = Ledger()
    assert used(kernel.look(ledger)) == 0
    kernel.burn(root, 3)
    kernel.burn(child, 4)
    assert used(kernel.look(ledger)) == 7
    kernel.exit(child)
    kernel.wait(root)
    kernel.release()
    assert used(kernel.look(ledger)) == 7


def test_an_app_that_left_the_list_is_forgotten() -> None:
    """State is kept for what PM2 lists and no longer; one that comes back under another name is another app."""
    kernel, ledger, root, _ = family()
    del kernel.roots[APP]
    assert kernel.look(ledger) == ()
    assert ledger.totals == {}
    kernel.roots["renamed", "0"] = root
    assert list(totals(kernel.look(ledger))) == [("renamed", "0")]
