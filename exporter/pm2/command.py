"""A command that prints `pm2 jlist`, for where the socket cannot be reached: another user, another container.

Run by hand, `pm2 jlist` starts a daemon where none runs. Here it cannot: PM2 opens its log file before it starts a daemon,
and the environment variable PM2_LOG_FILE_PATH says where that file is; it is set to a path that cannot exist, so that PM2
ends with an error instead. A running daemon is asked without that file. `sudo`, `docker exec` and their like do not hand
the environment on, so there the variable must stand in the command itself, which `check` holds.

What runs as another user cannot be ended from here, and what runs in a container outlives `docker exec`: put `timeout 5`
before pm2 there.

Source: PM2's lib/Client.js (launchDaemon, initFileStructure), lib/paths.js and constants.js; tried on PM2 7, 6, 5 and 4.
"""

import asyncio
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import PurePath
from typing import Final

from exporter.pm2.process import Listing, NonsenseError, decode_output
from exporter.pm2.rpc import MAX_REPLY, PM2Error, Reason

NOWHERE: Final = "/dev/null/pm2-is-not-running"
"""A path that cannot be opened, whoever tries, and that names the reason in PM2's error."""

GUARD: Final = f"PM2_LOG_FILE_PATH={NOWHERE}"

# Programmatic keeps PM2 from greeting, writing into its home and asking the world for a newer version.
_ENVIRON = {"PM2_LOG_FILE_PATH": NOWHERE, "PM2_PROGRAMMATIC": "true", "PM2_DISABLE_VERSION_CHECK": "true"}

_BORDERS = {
    *("sudo", "doas", "su", "runuser", "setpriv", "pkexec", "machinectl", "systemd-run", "env", "ssh"),
    *("docker", "podman", "nerdctl", "kubectl", "oc", "crictl", "lxc", "lxc-attach", "incus", "nsenter", "chroot"),
}
"""Programs that run a command in an environment which is not, or not surely, ours."""

_ERRORS_KEPT = 16 * 1024
_GONE_WITHIN = 0.1


def check(argv: Sequence[str]) -> None:
    """Raise ValueError where this command could start a daemon, or is none."""
    if not argv or not argv[0]:
        raise ValueError("a command has at least a program")
    if any("\0" in argument for argument in argv):
        raise ValueError("a command holds no null characters")
    words = " ".join(argv).split()
    border = next((name for word in words if (name := PurePath(word).name) in _BORDERS), None)
    if border and GUARD not in words:
        raise ValueError(
            f"{border} may not hand the environment on, so write {GUARD} into the command, or it could start a PM2 daemon "
            f"where none runs: [sudo, -n, -u, USER, env, {GUARD}, pm2, jlist] or "
            f"[docker, exec, -e, {GUARD}, CONTAINER, pm2, jlist]"
        )


class Command:
    """Runs a command for each question; no shell, no input, one at a time, and gone when its time is up."""

    def __init__(self, argv: Sequence[str], *, environ: Mapping[str, str], max_reply: int = MAX_REPLY) -> None:
        """Run `argv` in this environment, made safe; raise ValueError for a command that could start a daemon."""
        check(argv)
        self._argv = tuple(argv)
        self._environ = {**environ, **_ENVIRON}
        self._limit = max_reply
        self._left: asyncio.SubprocessTransport | None = None

    async def listing(self, within: float) -> Listing:
        """Return the list that the command prints; raise PM2Error, at the latest after `within` seconds."""
        if self._left is not None and self._left.get_returncode() is None:
            raise self._error(Reason.TIMEOUT, "an earlier run has not ended yet")
        try:
            async with asyncio.timeout(within):
                said = await self._run()
        except TimeoutError:
            raise self._error(Reason.TIMEOUT, "it did not end in time") from None
        except OSError as error:
            missing = isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError)
            reason = Reason.COMMAND_MISSING if missing else Reason.UNREACHABLE
            raise self._error(reason, error.strerror or "it cannot be started") from None
        if said.too_large:
            raise self._error(Reason.TOO_LARGE, "it printed more than is allowed")
        if said.returncode:
            if NOWHERE.encode() in said.errors or NOWHERE.encode() in said.output:
                raise self._error(Reason.NO_DAEMON, "it found no running daemon")
            raise self._error(Reason.COMMAND_FAILED, f"it {_ended(said.returncode)}{_first_line(bytes(said.errors))}")
        try:
            return await asyncio.to_thread(decode_output, bytes(said.output))
        except NonsenseError as error:
            raise self._error(Reason.NONSENSE, str(error)) from None

    async def _run(self) -> "_Said":
        loop = asyncio.get_running_loop()
        transport, said = await loop.subprocess_exec(
            lambda: _Said(loop, self._limit),
            *self._argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environ,
            start_new_session=True,
        )
        try:
            await said.ended
            said.returncode = transport.get_returncode()
        finally:
            if not said.complete:
                # The group too: a wrapper's children would go on without it. What runs as another user cannot be ended.
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(transport.get_pid(), signal.SIGKILL)
                await asyncio.wait({said.exited}, timeout=_GONE_WITHIN)
                self._left = transport
            with suppress(PermissionError):
                transport.close()
        return said

    def _error(self, reason: Reason, text: str) -> PM2Error:
        return PM2Error(reason, f"the command {PurePath(self._argv[0]).name}: {text}")


class _Said(asyncio.SubprocessProtocol):
    """What a command printed, bounded, and when it ended."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int) -> None:
        self.output, self.errors = bytearray(), bytearray()
        self.returncode: int | None = None
        self.too_large = self.complete = False
        self.exited: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self._limit = limit

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd != 1:
            self.errors += data[: _ERRORS_KEPT - len(self.errors)]
        elif self.too_large or len(self.output) + len(data) > self._limit:
            self.too_large = True
            _set(self.ended)
        else:
            self.output += data

    def process_exited(self) -> None:
        _set(self.exited)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 -- asyncio's signature
        """Note that the process has exited and every pipe is closed."""
        self.complete = True
        _set(self.ended)


def _set(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _ended(returncode: int) -> str:
    return f"was ended by signal {-returncode}" if returncode < 0 else f"ended with status {returncode}"


def _first_line(errors: bytes) -> str:
    """Return the first line of what was printed as an error, such as "sudo: a password is required", for a person."""
    for line in errors.decode("utf-8", "replace").splitlines():
        if line.strip():
            return ": " + "".join([char if char.isprintable() else "\ufffd" for char in line.strip()])[:200]
    return ""
