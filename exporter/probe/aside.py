"""Blocking work that may hang, kept where only its own thread hangs."""

import _thread
import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

BRANCHES_AT_ONCE = 64
"""Pieces of work under way at the same time; more are refused."""

_branches = threading.BoundedSemaphore(BRANCHES_AT_ONCE)


class BusyError(Exception):
    """Too much work hangs already, or there can be no more threads."""


async def aside(work: Callable[[], T]) -> T:
    """Run `work`, which may block for long, in a thread of its own, and wait for it.

    When `work` hangs, only its thread does: no pool runs dry and the program's end does not wait. Raises BusyError when
    there can be no more threads, and whatever `work` raises.
    """
    if not _branches.acquire(blocking=False):
        raise BusyError
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]  # None only where T is

    def run() -> None:
        result: T | None = None
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 -- handed to whoever waits
            failure = error
        finally:
            _branches.release()
        # The loop may be gone by now; nobody waits then.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, failure)

    # Not threading.Thread, whose start waits for the new thread to be scheduled, and the loop with it.
    try:
        _thread.start_new_thread(run, ())
    except RuntimeError:
        _branches.release()
        raise BusyError from None
    return await done
