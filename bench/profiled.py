"""What runs in the exporter's process when it is profiled; see bench/profile_scrape.py. Imports nothing that would weigh.

python profiled.py cprofile|tracemalloc|imports FILE FLAG...
"""

import builtins
import importlib
import json
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, ModuleType

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def serve(argv: Sequence[str]) -> None:
    """Run the exporter in this process, until SIGTERM."""
    sys.argv = ["pm2-exporter", *argv]
    main: Callable[[], object] = importlib.import_module("exporter.cli").main
    main()


def under_cprofile(to: Path, argv: Sequence[str]) -> None:
    """Run the exporter under cProfile from SIGUSR1 to SIGUSR2; the statistics are written at the end."""
    import cProfile  # noqa: PLC0415 -- only here, for it must not weigh elsewhere

    profile = cProfile.Profile(time.thread_time)
    signal.signal(signal.SIGUSR1, lambda *_: profile.enable())

    def stop(_number: int, _frame: FrameType | None) -> None:
        profile.disable()
        profile.dump_stats(to)

    signal.signal(signal.SIGUSR2, stop)
    serve(argv)


def under_tracemalloc(to: Path, argv: Sequence[str]) -> None:
    """Run the exporter under tracemalloc; at SIGUSR2 the bytes held by each file are written."""
    import tracemalloc  # noqa: PLC0415 -- only here, for it must not weigh elsewhere

    def write(_number: int, _frame: FrameType | None) -> None:
        held = {one.traceback[0].filename: one.size for one in tracemalloc.take_snapshot().statistics("filename")}
        to.write_text(json.dumps(held))

    signal.signal(signal.SIGUSR2, write)
    tracemalloc.start()
    serve(argv)


def weighing_imports(to: Path, argv: Sequence[str]) -> None:
    """Run the exporter with each import weighed; at SIGUSR2 the resident bytes each top package added are written."""
    added: dict[str, int] = defaultdict(int)
    added["Python itself"] = resident_bytes()
    first: dict[str, str] = {}
    inner = [0]
    load = builtins.__import__

    def weigh(
        name: str,
        globals: Mapping[str, object] | None = None,  # noqa: A002 -- __import__'s own word
        locals: Mapping[str, object] | None = None,  # noqa: A002 -- the same
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        package = (str((globals or {}).get("__package__") or "") if level else name).partition(".")[0]
        first.setdefault(package, str((globals or {}).get("__name__")))
        before = resident_bytes()
        inner.append(0)
        try:
            return load(name, globals, locals, fromlist, level)
        finally:
            grown, nested = resident_bytes() - before, inner.pop()
            inner[-1] += grown
            added[package] += grown - nested

    def write(_number: int, _frame: FrameType | None) -> None:
        to.write_text(json.dumps({f"{name}, first for {first.get(name)}": size for name, size in added.items()}))

    signal.signal(signal.SIGUSR2, write)
    builtins.__import__ = weigh
    serve(argv)


def resident_bytes() -> int:
    """Return this process's resident memory, as /proc/self/statm says."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


CHILDREN = {"cprofile": under_cprofile, "tracemalloc": under_tracemalloc, "imports": weighing_imports}

if __name__ == "__main__":
    CHILDREN[sys.argv[1]](Path(sys.argv[2]), sys.argv[3:])
