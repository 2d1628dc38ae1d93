"""Process trees of the tests' own, each root told by its standard input what to do next."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import psutil
import pytest


class Root:
    """A running root of a tree; every line that it is told is answered by one."""

    def __init__(self, argv: Sequence[str]) -> None:
        """Start it."""
        self.process = subprocess.Popen(  # noqa: S603 -- the tests' own
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    @property
    def pid(self) -> int:
        """Return its pid."""
        return self.process.pid

    def tell(self, line: str) -> str:
        """Have something done, and return the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        """End it, with all below it."""
        family: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.pid).children(recursive=True)
        self.process.kill()
        self.process.communicate()
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.kill()


@pytest.fixture
def start() -> Iterator[Callable[..., Root]]:
    """Return a function that starts a root: a program, or Python text."""
    roots: list[Root] = []

    def begin(*argv: str, python: str = "") -> Root:
        roots.append(Root([sys.executable, "-c", python] if python else argv))
        return roots[-1]

    yield begin
    for root in roots:
        root.close()
