"""The door for who may only look: PM2's daemon is asked over `rpc.sock`, and nothing can be done to it from here.

Asking never starts a daemon. Every failure is a `PM2Error` with a `Reason` (exporter/pm2/rpc.py).
"""

import asyncio
import math
import os
from typing import Protocol

import msgspec

from exporter.pm2.process import Daemon, Listing, decode_reply, decode_report, decode_result
from exporter.pm2.rpc import MAX_REPLY, METHODS, CallError, Door, Method, Peer, PM2Error, Reason, call, read

__all__ = ["CallError", "PM2Error", "Peer", "Reader", "Reason", "Shared", "Source"]


class Source(Protocol):
    """Where the process list comes from."""

    async def listing(self, within: float) -> Listing:
        """Return PM2's list as it is now; raise PM2Error, at the latest after `within` seconds."""
        ...


class Reader:
    """Asks PM2's daemon over `rpc.sock`; a fresh connection each time, so that a new daemon is simply found."""

    def __init__(self, home: str | os.PathLike[str], *, max_reply: int = MAX_REPLY) -> None:
        """Ask the daemon of this PM2 home; answers of more than `max_reply` bytes are refused."""
        self._door = Door(home, max_reply)
        self._daemon: Daemon | None = None

    async def ping(self, within: float) -> Peer:
        """Return who listens, once the daemon has answered."""
        _, peer = await self._door.ask(within, call(Method.PING, {}))
        return peer

    async def version(self, within: float) -> str:
        """Return PM2's version."""
        (reply,), _ = await self._door.ask(within, call(Method.VERSION, {}))
        return str(read(decode_result, reply))

    async def methods(self, within: float) -> frozenset[str]:
        """Return the names of the calls that this daemon knows."""
        (reply,), _ = await self._door.ask(within, METHODS)
        return frozenset(read(decode_result, reply) or ())

    async def report(self, within: float) -> Daemon:
        """Return what the daemon says of itself."""
        (reply,), peer = await self._door.ask(within, call(Method.REPORT, {}))
        return _with_peer(read(decode_report, reply), peer)

    async def listing(self, within: float) -> Listing:
        """Return the processes and the daemon; a report that cannot be had hides no process.

        What a daemon says of itself does not change while it lives, so it is asked for it once: the kernel tells whether
        who answers is still the same process.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within
        if self._daemon is not None:
            (processes,), peer = await self._door.ask(within, call(Method.LIST, {}))
            if peer.pid == self._daemon.pid:
                return msgspec.structs.replace(read(decode_reply, processes), daemon=self._daemon)
        within = deadline - loop.time()
        (processes, report), peer = await self._door.ask(within, call(Method.LIST, {}), call(Method.REPORT, {}))
        listing = read(decode_reply, processes)
        try:
            daemon = _with_peer(read(decode_report, report), peer)
            self._daemon = daemon if daemon.pid is not None else None
        except PM2Error:
            daemon = _with_peer(Daemon(), peer)
        return msgspec.structs.replace(listing, daemon=daemon)


def _with_peer(daemon: Daemon, peer: Peer) -> Daemon:
    return msgspec.structs.replace(daemon, pid=peer.pid, uid=peer.uid if daemon.uid is None else daemon.uid)


class Shared:
    """Asks a source once for all who want to know at the same moment; keeps nothing once it has answered.

    Who joins may be told what was so a moment before it asked: good to look at, not to check what one has just done.
    """

    def __init__(self, source: Source, *, longest: float = math.inf) -> None:
        """Share this source; nobody waits for it for more than `longest` seconds."""
        self._source, self._longest = source, longest
        self._flight: _Flight | None = None

    async def listing(self, within: float) -> Listing:
        """Return the source's answer; raise its PM2Error, or TIMEOUT once this caller's own time is up."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + min(within, self._longest)
        while True:
            flight = self._flight
            joined = flight is not None and not flight.task.done()
            if flight is None or not joined:
                task = asyncio.create_task(self._source.listing(deadline - loop.time()), name="PM2's process list")
                flight = self._flight = _Flight(task)
            await self._wait(flight, deadline - loop.time())
            if not flight.task.done():
                raise PM2Error(Reason.TIMEOUT, "PM2 did not answer in time")
            try:
                return flight.task.result()
            except PM2Error as error:
                # Whoever asked first may have had less time than we have.
                if not (joined and error.reason is Reason.TIMEOUT and loop.time() < deadline):
                    raise

    async def _wait(self, flight: "_Flight", within: float) -> None:
        flight.waiting += 1
        try:
            await asyncio.wait({flight.task}, timeout=within)
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                flight.task.cancel()
                self._flight = None


class _Flight:
    """One question under way, and how many wait for its answer."""

    __slots__ = ("task", "waiting")

    def __init__(self, task: "asyncio.Task[Listing]") -> None:
        self.task = task
        self.waiting = 0
