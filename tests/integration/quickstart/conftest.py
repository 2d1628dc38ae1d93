"""A fresh clone, a home of its own, and script/quickstart run in it as a person would."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import requests

ROOT = Path(__file__).parents[3]


class Clone:
    """One clone of this repository and a home, and what quickstart does there."""

    def __init__(self, folder: Path, home: Path) -> None:
        """Make `folder` what a clone would be were the working tree committed; return before anything was run."""
        self.folder, self.home = folder, home
        self.home.mkdir(exist_ok=True)
        git = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(git, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60).stdout  # noqa: S603 -- git
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        self.state = folder / ".state" / "quickstart"
        self.mark = f"PM2_SELFHEAL_QUICKSTART={self.state}".encode()

    @property
    def environ(self) -> dict[str, str]:
        """Return the environment of a person who has no PM2: this one with another home."""
        npmrc = Path.home() / ".npmrc"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PM2_", "WORDPECKER_", "SUDO_"))}
        return kept | {"HOME": str(self.home)} | ({"NPM_CONFIG_USERCONFIG": str(npmrc)} if npmrc.exists() else {})

    def run(self, *arguments: str, code: int = 0, environ: Mapping[str, str] | None = None) -> str:
        """Run script/quickstart from elsewhere, without a terminal; return what it said."""
        done = subprocess.run(  # noqa: S603 -- nothing foreign in it
            [str(self.folder / "script" / "quickstart"), *arguments],
            cwd="/",
            env=self.environ | dict(environ or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def processes(self) -> set[int]:
        """Return every living process that quickstart started in this clone."""
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if self.mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.add(int(entry.name))
        return found

    def recorded(self, key: str) -> str:
        """Return what quickstart wrote down about what runs."""
        lines = (self.state / "running").read_text().splitlines()
        return [line.partition("=")[2] for line in lines if line.startswith(f"{key}=")][-1]

    def scrape(self, said: str) -> str:
        """Return one scrape from the address that was said."""
        found = re.search(r"^ *metrics +(http://127\.0\.0\.1:\d+/metrics)$", said, re.MULTILINE)
        assert found, said
        with requests.Session() as session:
            session.trust_env = False
            return session.get(found[1], timeout=20).text


def until(condition: Callable[[], object], *, within: float = 60) -> None:
    """Poll until `condition` is true or `within` seconds have passed."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {within} s")
        time.sleep(0.02)


@pytest.fixture(scope="session")
def cloned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    """Return a clone, in a path with a space, in which quickstart has never run."""
    base = tmp_path_factory.mktemp("quickstart")
    clone = Clone(base / "a clone", base / "home")
    try:
        yield clone
    finally:
        clone.run("--stop")
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def clone(cloned: Clone) -> Iterator[Clone]:
    """Return the clone with nothing running before, and see that nothing runs after."""
    try:
        yield cloned
    finally:
        cloned.run("--stop")
        assert cloned.processes() == set()
        assert not (cloned.home / ".pm2").exists()  # nothing ever touches the user's own PM2 home


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """Return a folder with this system's commands except Python, Node and packaging: a bare machine's PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    lacking = re.compile(r"python|pip|node|npm|pm2|apt|sudo|id$")
    for source in (Path("/usr/bin"), Path("/bin")):
        for command in source.iterdir():
            if not lacking.match(command.name) and not (folder / command.name).exists():
                (folder / command.name).symlink_to(command)
    return folder
