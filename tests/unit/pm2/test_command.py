"""A command in place of the socket: bounded, robust, and unable to start a daemon."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from exporter.pm2.client import PM2Error, Reason
from exporter.pm2.command import GUARD, NOWHERE, Command, check

LIST = json.dumps([{"name": "web", "pm_id": 0, "pid": 7, "pm2_env": {"status": "online"}}])


def python(code: str) -> Command:
    """Return a command that runs Python code as a stand-in for pm2."""
    return Command([sys.executable, "-c", code], environ=os.environ, max_reply=100_000)


def shell(code: str) -> Command:
    """Return a command that runs a shell script as a stand-in for pm2."""
    return Command(["/bin/sh", "-c", code], environ=os.environ, max_reply=100_000)


async def failure(command: Command, within: float = 10.0) -> PM2Error:
    """Return what the command's failure is."""
    with pytest.raises(PM2Error) as caught:
        await command.listing(within)
    return caught.value


async def test_the_list_is_read() -> None:
    """The list is found in what the command prints; what it says as an error is not mixed in."""
    listing = await python(f"import sys; print('[PM2] hi'); sys.stderr.write('[{{' * 99); print({LIST!r})").listing(10)
    assert [process.name for process in listing.processes] == ["web"]
    assert listing.daemon is None


async def test_there_is_no_shell_and_no_input() -> None:
    """Arguments reach the program as they are, and its input is empty."""
    code = f"import sys; assert sys.argv[1] == '$(touch x);*' and not sys.stdin.read(); print({LIST!r})"
    command = Command([sys.executable, "-c", code, "$(touch x);*"], environ={}, max_reply=1000)
    assert len((await command.listing(10)).processes) == 1


async def test_the_guard_reaches_the_command() -> None:
    """PM2_LOG_FILE_PATH points nowhere, whatever the environment said, so that no pm2 below can start a daemon."""
    code = f"import os; assert os.environ['PM2_LOG_FILE_PATH'] == {NOWHERE!r}; print({LIST!r})"
    command = Command([sys.executable, "-c", code], environ={"PM2_LOG_FILE_PATH": "/var/log/pm2.log"}, max_reply=1000)
    assert len((await command.listing(10)).processes) == 1


def test_the_guard_cannot_be_opened() -> None:
    """Nobody, not even root, can open the guard's path."""
    with pytest.raises(NotADirectoryError):
        Path(NOWHERE).open("a")  # noqa: SIM115 -- it cannot be opened


@pytest.mark.parametrize(
    "argv",
    [
        ["sudo", "-n", "-u", "deploy", "pm2", "jlist"],
        ["/usr/bin/docker", "exec", "web", "pm2", "jlist"],
        ["timeout", "5", "sudo", "-u", "deploy", "pm2", "jlist"],
        ["sh", "-c", "ssh host pm2 jlist"],
        ["docker", "exec", "-e", GUARD + "x", "web", "pm2", "jlist"],
        [],
        [""],
        ["pm2", "jl\0ist"],
    ],
)
def test_a_command_that_could_start_a_daemon_is_refused(argv: Sequence[str]) -> None:
    """What does not hand the environment on must carry the guard itself."""
    with pytest.raises(ValueError, match=r"PM2_LOG_FILE_PATH|program|null"):
        check(argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["pm2", "jlist"],
        ["sudo", "-n", "-u", "deploy", "env", GUARD, "timeout", "5", "pm2", "jlist"],
        ["docker", "exec", "-e", GUARD, "web", "timeout", "5", "pm2", "jlist"],
        ["sh", "-c", f"ssh host env {GUARD} pm2 jlist"],
    ],
)
def test_a_safe_command_is_taken(argv: Sequence[str]) -> None:
    """What hands the environment on, or carries the guard, is taken."""
    check(argv)


async def test_no_daemon_is_told_apart() -> None:
    """PM2's failure to open the guard's path means that no daemon runs."""
    error = await failure(shell(f"echo \"Error: ENOTDIR, path: '{NOWHERE}'\" >&2; exit 1"))
    assert error.reason is Reason.NO_DAEMON


async def test_a_failing_command_says_why() -> None:
    """The first line of its errors is there for a person, bounded and printable; its output is not."""
    error = await failure(shell("echo secret; printf '\\n  sudo: \\033[1ma password is required\\nmore' >&2; exit 3"))
    assert error.reason is Reason.COMMAND_FAILED
    assert str(error) == "the command sh: it ended with status 3: sudo: \ufffd[1ma password is required"
    error = await failure(shell("kill -9 $$"))
    assert (error.reason, str(error)) == (Reason.COMMAND_FAILED, "the command sh: it was ended by signal 9")
    error = await failure(python("import sys; sys.stderr.write('x' * 1_000_000); sys.exit(1)"))
    assert len(str(error)) < 300


async def test_a_missing_command_is_told_apart(tmp_path: Path) -> None:
    """A program that is not there, or may not be run, is no failure of PM2's."""
    plain = tmp_path / "plain"
    plain.write_text("no program")
    for program in ("/nowhere/pm2", str(plain), "no-such-program-anywhere"):
        error = await failure(Command([program], environ=os.environ, max_reply=1000))
        assert error.reason is Reason.COMMAND_MISSING


@pytest.mark.parametrize("code", ["true", "echo '[PM2] no list'", "echo '[{\"name\":'"])
async def test_no_list_is_nonsense(code: str) -> None:
    """A command that succeeds without a list has not said that there are no apps."""
    assert (await failure(shell(code))).reason is Reason.NONSENSE


async def test_endless_output_is_cut() -> None:
    """A command that prints without end is killed once it printed more than allowed."""
    assert (await failure(Command(["yes"], environ=os.environ, max_reply=100_000))).reason is Reason.TOO_LARGE


def lives(pid: int) -> bool:
    """Tell whether a process runs, zombies not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def said(path: Path) -> str:
    """Return what a file holds, nothing where it is missing."""
    return path.read_text() if path.exists() else ""


def descriptors() -> int:
    """Count the open descriptors of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def until(condition: Callable[[], object]) -> None:
    """Wait until the condition holds."""
    while True:
        if condition():
            return
        await asyncio.sleep(0.01)


async def gone(*pids: int) -> None:
    """Wait until none of the processes is left."""
    await until(lambda: not any(lives(pid) for pid in pids))


async def written(path: Path) -> int:
    """Wait for a pid to be written into a file."""
    await until(lambda: said(path).strip())
    return int(said(path))


TREE = "sleep 1000 & echo $! > {child}; echo $$ > {self}; trap '' TERM; wait; sleep 1000"


async def test_what_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    """When its time is up the whole process group is gone, and the next run starts."""
    own, child = tmp_path / "self", tmp_path / "child"
    command = shell(TREE.format(self=own, child=child))
    task = asyncio.create_task(failure(command, 0.5))
    pids = await written(own), await written(child)
    assert (await task).reason is Reason.TIMEOUT
    await gone(*pids)
    assert "earlier" not in str(await failure(command, 0.1))


async def test_a_cancelled_question_leaves_nothing(tmp_path: Path) -> None:
    """A scrape that goes away takes the command and its children with it."""
    own, child = tmp_path / "self", tmp_path / "child"
    task = asyncio.create_task(shell(TREE.format(self=own, child=child)).listing(60))
    pids = await written(own), await written(child)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await gone(*pids)


async def test_what_leaves_the_group_is_not_waited_for(tmp_path: Path) -> None:
    """A descendant in a session of its own that keeps the output open costs no more than the time given."""
    pid_file = tmp_path / "pid"
    task = asyncio.create_task(failure(shell(f"setsid sh -c 'echo $$ > {pid_file}; exec sleep 1000' & wait"), 0.5))
    pid = await written(pid_file)
    try:
        assert (await task).reason is Reason.TIMEOUT
    finally:
        os.kill(pid, signal.SIGKILL)
        await gone(pid)


async def test_runs_leave_no_descriptors() -> None:
    """However a run ends, its pipes are closed."""
    commands = [shell(f"echo '{LIST}'"), shell("exit 1"), Command(["/nowhere"], environ={}, max_reply=10)]

    async def round_trip() -> None:
        for command in commands:
            await asyncio.gather(command.listing(10), return_exceptions=True)

    await round_trip()
    before = descriptors()
    for _ in range(10):
        await round_trip()
    await asyncio.sleep(0)
    assert descriptors() <= before
