"""The first command after a clone does what it says, can be taken back, and touches nothing of the user's."""

import os
import re
import socket
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.quickstart.conftest import Clone, until

if TYPE_CHECKING:
    from tests.integration.conftest import PM2

pytestmark = pytest.mark.timeout(300)
BOTH = ("wordpecker-backend", "wordpecker-frontend")
APP = {"name": "theirs", "source": "setInterval(() => {}, 1000)"}
OFFLINE = {
    "PIP_INDEX_URL": "http://127.0.0.1:1/simple",
    "PIP_FIND_LINKS": "",
    "UV_INDEX_URL": "http://127.0.0.1:1/simple",
    "NPM_CONFIG_REGISTRY": "http://127.0.0.1:1/",
}


def online(metrics: str) -> set[str]:
    """Return the names of the apps that are online in a scrape."""
    rows = re.findall(r"^pm2_process_status\{(.*)\} 1(?:\.0)?$", metrics, re.MULTILINE)
    return {name[1] for row in rows if 'status="online"' in row and (name := re.search(r'\bname="([^"]*)"', row))}


def test_from_the_clone_to_the_figures_and_back(clone: Clone) -> None:
    """A first run installs, starts, shows; a second changes nothing; --stop ends all of it and nothing else."""
    said = clone.run()
    metrics = clone.scrape(said)
    assert online(metrics) == set(BOTH)
    assert re.findall(r"^probe_success\{.*\} (.*)$", metrics, re.MULTILINE) in (["1", "1"], ["1.0", "1.0"])
    assert all(re.search(rf"{name} +online +\d+\.\d MiB +0 restarts", said) for name in BOTH), said
    assert re.search(r"exporter and its libraries \.\.\. \(\d+\.\d s\)", said), "how long a step took"
    exporter, url = clone.recorded("exporter"), clone.recorded("url")

    again = clone.run()
    assert "already running" in again
    assert (clone.recorded("exporter"), clone.recorded("url")) == (exporter, url)
    assert f"{url}/metrics" in clone.run("--status")

    running = clone.processes()
    assert len(running) == 4  # the exporter, PM2's daemon and two apps
    assert "stopped" in clone.run("--stop")
    assert clone.processes() == set()
    assert not (clone.state / "pm2").exists()
    assert "not running" in clone.run("--status", code=3)
    assert "nothing runs" in clone.run("--stop")


def test_after_the_first_time_no_network_is_needed(clone: Clone) -> None:
    """With every package index out of reach, what was installed once starts again."""
    clone.run()
    clone.run("--stop")
    assert online(clone.scrape(clone.run(environ=OFFLINE))) == set(BOTH)


def test_the_users_own_apps_are_watched(clone: Clone, pm2_daemon: "PM2") -> None:
    """Where the user's PM2 has apps they are shown, no example is started, and --stop leaves them alone."""
    pm2_daemon.start(APP)
    daemon, apps = pm2_daemon.pid, set(pm2_daemon.processes())
    said = clone.run(environ={"PM2_HOME": str(pm2_daemon.home)})
    assert online(clone.scrape(said)) == {"theirs"}
    assert len(clone.processes()) == 1
    clone.run("--stop")
    assert pm2_daemon.pid == daemon
    assert set(pm2_daemon.processes()) == apps


@pytest.mark.parametrize("state", ["no apps", "killed"])
def test_a_pm2_without_apps_means_the_example(clone: Clone, pm2_daemon: "PM2", state: str) -> None:
    """A daemon without apps, or only the socket of one that crashed, is left as it is; the example is shown, and why."""
    if state == "killed":
        pm2_daemon.kill()
        assert (pm2_daemon.home / "rpc.sock").exists()
    before = set(pm2_daemon.processes())
    said = clone.run(environ={"PM2_HOME": str(pm2_daemon.home)})
    assert ("has no apps" if state == "no apps" else "does not answer (refused)") in said
    assert online(clone.scrape(said)) == set(BOTH)
    assert set(pm2_daemon.processes()) == before


def test_apps_that_came_later_replace_the_example(clone: Clone, pm2_daemon: "PM2") -> None:
    """Run again once the user's PM2 has apps, it shows those, and the example is gone."""
    clone.run()
    pm2_daemon.start(APP)
    said = clone.run(environ={"PM2_HOME": str(pm2_daemon.home)})
    assert online(clone.scrape(said)) == {"theirs"}
    assert len(clone.processes()) == 1


def test_taken_ports_are_left_to_their_owners(clone: Clone) -> None:
    """Where the usual ports are taken, free ones are used and told."""
    held = []
    for port in (9209, 3000, 3001):
        try:
            held.append(socket.create_server(("127.0.0.1", port)))
        except OSError:
            continue  # taken by somebody else: as good
    try:
        said = clone.run()
        assert online(clone.scrape(said)) == set(BOTH)
        assert not re.search(r":(9209|3000|3001)/", said)
        assert said.count("  up, ") == 2
    finally:
        for each in held:
            each.close()


@pytest.mark.parametrize("victim", ["exporter", "daemon"])
def test_what_died_is_started_anew(clone: Clone, victim: str) -> None:
    """Run again after the exporter or the example's daemon was killed, it stands up again, without a second copy."""
    clone.run()
    old = clone.recorded(victim)
    os.kill(int(old.split()[0]), 9)
    said = clone.run()
    assert "already running" not in said
    assert online(clone.scrape(said)) == set(BOTH)
    assert clone.recorded(victim) != old
    assert len(clone.processes()) == 4


def test_a_frozen_exporter_is_replaced(clone: Clone) -> None:
    """An exporter that lives and does not answer counts as not running, and is ended for good."""
    clone.run()
    old = int(clone.recorded("exporter").split()[0])
    os.kill(old, 19)
    assert "not running" in clone.run("--status", code=3)
    said = clone.run()
    assert online(clone.scrape(said)) == set(BOTH)
    assert old not in clone.processes()


def test_a_changed_program_is_started_anew(clone: Clone) -> None:
    """After an update of the clone the old program is not left running."""
    clone.run()
    old = clone.recorded("exporter")
    source = clone.folder / "exporter" / "__init__.py"
    text = source.read_text()
    try:
        source.write_text(text + "# changed\n")
        assert "out of date" in clone.run()
        assert clone.recorded("exporter") != old
    finally:
        source.write_text(text)


def test_two_at_once_do_not_meet(clone: Clone) -> None:
    """Two runs at the same time end with one of everything."""
    said: list[str] = []
    runs = [threading.Thread(target=lambda: said.append(clone.run())) for _ in range(2)]
    for each in runs:
        each.start()
    for each in runs:
        each.join()
    assert all(online(clone.scrape(each)) == set(BOTH) for each in said)
    assert sum("already running" in each for each in said) == 1
    assert len(clone.processes()) == 4


@pytest.mark.parametrize("arguments", [(), ("--stop",)], ids=["start", "stop"])
def test_what_is_not_written_down_is_found_and_ended(clone: Clone, arguments: tuple[str, ...]) -> None:
    """Where .state was cleaned away under what runs, the next run or --stop ends it all the same."""
    clone.run()
    left = clone.processes()
    (clone.state / "running").unlink()
    clone.run(*arguments)
    assert len(left) == 4
    assert not left & clone.processes()


def test_a_foreign_process_is_never_ended(clone: Clone) -> None:
    """A process id that was written down and now means another process, with whatever start time, is left alone."""
    clone.run()
    clone.run("--stop")
    with subprocess.Popen(["sleep", "60"]) as other:  # noqa: S607 -- the system's own
        born = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19]
        for when in (born, "1"):
            (clone.state / "running").write_text(f"exporter={other.pid} {when}\ndaemon={other.pid} {when}\nsource=yours\n")
            clone.run("--status", code=3)
            clone.run("--stop")
            assert other.poll() is None
        other.kill()


def test_a_failed_start_leaves_nothing_behind(clone: Clone) -> None:
    """Where the exporter cannot start, that is said with its reason and the example is taken back."""
    source = clone.folder / "exporter" / "__main__.py"
    text = source.read_text()
    try:
        source.write_text("raise SystemExit('broken on purpose')\n")
        said = clone.run(code=1)
    finally:
        source.write_text(text)
    assert "broken on purpose" in said
    assert clone.processes() == set()
    clone.run("--status", code=3)


def test_an_interrupted_start_leaves_nothing_behind(clone: Clone) -> None:
    """Ended half-way, it takes back what it has started."""
    command = [str(clone.folder / "script" / "quickstart")]
    with subprocess.Popen(command, env=clone.environ, stdout=subprocess.PIPE, text=True) as run:  # noqa: S603 -- the clone's own
        assert run.stdout
        until(lambda: clone.processes() - {run.pid})  # PM2's command or daemon
        run.terminate()
        assert run.wait(60) == 130
    assert clone.processes() == set()
    clone.run("--status", code=3)


def test_a_deep_clone_still_gets_its_sockets(tmp_path: Path) -> None:
    """Where the clone's path is too long for a Unix socket, PM2's home is elsewhere, and goes with --stop."""
    clone = Clone(tmp_path / ("deep" * 25) / "clone", tmp_path / "home")
    try:
        assert online(clone.scrape(clone.run())) == set(BOTH)
        home = Path(clone.recorded("home"))
        assert not home.is_relative_to(clone.folder)
        assert home.stat().st_mode & 0o077 == 0
    finally:
        clone.run("--stop")
    assert not home.exists()
    assert clone.processes() == set()


@pytest.mark.parametrize(
    ("name", "environ", "wanted"),
    [
        ("without Python", {}, ["Python with its venv module is missing", "apt-get install", "python3 python3-venv"]),
        ("wrong PYTHON", {"PYTHON": "/bin/false"}, ["PYTHON=/bin/false is no Python 3.11 or newer"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_missing_is_named(clone: Clone, tools: Path, name: str, environ: dict[str, str], wanted: list[str]) -> None:
    """Where it cannot go on it says exactly what to install, and its exit code says so too."""
    del name
    (tools / "id").write_text("#!/bin/sh\necho 1000\n")  # no root here
    (tools / "id").chmod(0o755)
    (tools / "apt-get").symlink_to("/bin/false")
    said = clone.run(code=5, environ={"PATH": str(tools), **environ})
    assert all(words in said for words in wanted), said
    assert clone.processes() == set()


def test_usage(clone: Clone) -> None:
    """Help says every option and exit code; anything else is refused without a change."""
    told = clone.run("--help")
    assert all(words in told for words in ("--status", "--stop", "PM2_HOME", "Exit codes"))
    assert "no such option: --nope" in clone.run("--nope", code=2)
    clone.run("--stop", "--status", code=2)


def test_secrets_of_the_user_go_nowhere(clone: Clone) -> None:
    """Nothing that is started holds the user's environment, and the home of the example's PM2 is closed to others."""
    said = clone.run(environ={"MONGODB_URI": "mongodb://someone:hush@127.0.0.1/", "OPENAI_API_KEY": "hush"})
    assert "hush" not in said + clone.scrape(said)
    for pid in clone.processes():
        assert b"hush" not in Path(f"/proc/{pid}/environ").read_bytes()
    assert (clone.state / "pm2").stat().st_mode & 0o077 == 0
