"""The flags and handlers that users of Prometheus's exporters know, on a running exporter."""

import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import bcrypt
import pytest
import requests
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

if TYPE_CHECKING:
    from tests.integration.face.conftest import Start

HOST_ONLY = ("--collector.disable-defaults", "--collector.host")


def run(*flags: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    command = [sys.executable, "-m", "exporter", *flags]
    env = {**os.environ, "PM2_HOME": "/nonexistent", **(environ or {})}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603 -- tests' own


def test_metrics_in_both_formats(start: "Start") -> None:
    """/metrics is text 0.0.4 by default, OpenMetrics where that is asked for, gzip where that is accepted."""
    exporter = start("", *HOST_ONLY)
    plain = exporter.get("/metrics", headers={"Accept-Encoding": "identity"})
    assert plain.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "Content-Encoding" not in plain.headers
    opened = exporter.get("/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0"})
    assert opened.headers["Content-Type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert opened.headers["Content-Encoding"] == "gzip"
    names = {family.name for family in parse_openmetrics(opened.text)}
    assert {"node_load1", "node_cpu_seconds", "pm2_exporter_build_info", "process_cpu_seconds"} <= names
    request = urllib.request.Request(f"http://{exporter.address}/metrics", headers={"Accept-Encoding": "gzip"})
    with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310 -- loopback
        assert b"node_load1" in gzip.decompress(response.read())


def test_selection(start: "Start") -> None:
    """collect[] and exclude[] choose collectors; both together, or an unknown one, are a 400 that says why."""
    exporter = start("", *HOST_ONLY, "--collector.filesystem")
    names = lambda page: {label["collector"] for label in page.labels("pm2_exporter_collector_success")}  # noqa: E731
    assert names(exporter.scrape()) == {"host", "filesystem"}
    assert names(exporter.scrape(**{"collect[]": "host"})) == {"host"}
    assert names(exporter.scrape(**{"exclude[]": ["host", "filesystem"]})) == set()
    both = exporter.get("/metrics?collect[]=host&exclude[]=host")
    assert (both.status_code, both.text) == (400, "collect[] and exclude[] cannot be used together\n")
    unknown = exporter.get("/metrics?collect[]=pm2")
    assert unknown.status_code == 400
    assert "no such collector, or not enabled: 'pm2'; enabled: host, filesystem" in unknown.text
    assert exporter.scrape().value("pm2_exporter_requests_total", code="400") == 2


def test_health_and_landing_page(start: "Start") -> None:
    """Liveness, readiness and a landing page that links what there is; HEAD works; other paths and methods do not exist."""
    exporter = start("", *HOST_ONLY, "--web.telemetry-path=/m")
    assert exporter.get("/-/healthy").text == "pm2-exporter is healthy.\n"
    assert exporter.get("/-/ready").text == "pm2-exporter is ready.\n"
    page = exporter.get("/")
    assert page.headers["Content-Type"].startswith("text/html")
    assert '<a href="/m">Metrics</a>' in page.text
    assert requests.head(f"http://{exporter.address}/m", timeout=10).status_code == 200
    assert exporter.get("/metrics").status_code == 404
    assert exporter.get("/-/reload").status_code == 405


def test_exporter_metrics_can_be_left_out(start: "Start") -> None:
    """The metrics about the exporter's own process are there, and can be switched off; build info stays."""
    own = {"process_resident_memory_bytes", "python_info", "pm2_exporter_requests_total"}
    with_own = {name for name, _ in start("", *HOST_ONLY).scrape().series}
    without = {name for name, _ in start("", *HOST_ONLY, "--web.disable-exporter-metrics").scrape().series}
    assert own <= with_own
    assert not own & without
    assert "pm2_exporter_build_info" in without


def test_reload(start: "Start", tmp_path: Path) -> None:
    """SIGHUP and POST /-/reload take in a changed file; a wrong one leaves the old one in force, and metrics say so."""
    exporter = start("collectors: {filesystem: false}", "--no-collector.http")
    config = tmp_path / "exporter-0.yml"
    on = lambda: {label["collector"] for label in exporter.scrape().labels("pm2_exporter_collector_success")}  # noqa: E731
    assert "filesystem" not in on()
    config.write_text("collectors: {host: false}")
    assert requests.post(f"http://{exporter.address}/-/reload", timeout=10).text == "reloaded\n"
    assert "filesystem" in on()
    assert not {"host", "http"} & on()
    config.write_text("colectors: {}")
    refused = requests.post(f"http://{exporter.address}/-/reload", timeout=10)
    assert refused.status_code == 500
    assert "colectors: unknown key; did you mean 'collectors'?" in refused.text
    assert exporter.scrape().value("pm2_exporter_config_last_reload_successful") == 0
    assert "host" not in on()
    config.write_text("")
    exporter.process.send_signal(signal.SIGHUP)
    exporter.until(lambda: "host" in on())
    assert exporter.scrape().value("pm2_exporter_config_last_reload_successful") == 1


@pytest.mark.parametrize("wrong", ["pipe", "folder", "gone", "bytes", "tag", "aliases"])
def test_reload_of_what_is_no_configuration(start: "Start", tmp_path: Path, wrong: str) -> None:
    """Whatever stands where the file was, a reload says so at once, and scrapes go on with the old configuration."""
    exporter = start("", *HOST_ONLY)
    config = tmp_path / "exporter-0.yml"
    config.unlink()
    match wrong:
        case "pipe":
            os.mkfifo(config)
        case "folder":
            config.mkdir()
        case "bytes":
            config.write_bytes(b"\xff")
        case "tag":
            config.write_text("pm2: {files: !!bool maybe}")
        case "aliases":
            lines = [f"a{level}: &a{level} [{','.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 9)]
            config.write_text("\n".join(["a0: &a0 [x]", *lines]))
    refused = requests.post(f"http://{exporter.address}/-/reload", timeout=10)
    assert refused.status_code == 500
    assert refused.text.startswith(f"failed to reload config: {config}")
    exporter.process.send_signal(signal.SIGHUP)
    exporter.until(lambda: exporter.log.read_text().count("the old one stays in force") == 2)
    page = exporter.scrape()
    assert page.value("pm2_exporter_config_last_reload_successful") == 0
    assert page.value("node_load1") is not None


def test_reloads_in_a_storm(start: "Start") -> None:
    """Any number of SIGHUPs and reload requests at once, with scrapes between them, end in the configuration on disk."""
    exporter = start("", *HOST_ONLY)
    url = f"http://{exporter.address}"
    with ThreadPoolExecutor(8) as pool:
        for _ in range(30):
            exporter.process.send_signal(signal.SIGHUP)
        posts = [pool.submit(requests.post, f"{url}/-/reload", timeout=30) for _ in range(20)]
        gets = [pool.submit(requests.get, f"{url}/metrics", timeout=30) for _ in range(20)]
        assert {answer.result().status_code for answer in (*posts, *gets)} == {200}
    assert exporter.scrape().value("pm2_exporter_config_last_reload_successful") == 1


def test_what_is_no_http_is_not_logged(start: "Start") -> None:
    """Strangers that send what is no HTTP get a 400, and cannot fill the log or write a credential into it."""
    exporter = start("", *HOST_ONLY)
    host, port = exporter.address.split(":")
    before = exporter.log.read_text()
    for sent in (b"\x16\x03\x01\n\n", b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Basic hunter2\x01\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=10) as stranger:
            stranger.sendall(sent)
            assert stranger.recv(100).startswith(b"HTTP/1.0 400 ")
    assert exporter.get("/-/healthy").status_code == 200
    assert exporter.log.read_text() == before


def test_concurrent_scrapes_are_limited(start: "Start", tmp_path: Path) -> None:
    """Beyond --web.max-requests a scrape is refused at once, and the ones under way are not disturbed."""
    (tmp_path / "slow.sh").write_text("#!/bin/sh\nread -r _ < " + str(tmp_path / "gate") + "\necho '[]'\n")
    (tmp_path / "slow.sh").chmod(0o755)
    os.mkfifo(tmp_path / "gate")
    flags = ("--web.max-requests=1", "--collector.disable-defaults", "--collector.pm2")
    exporter = start(f"pm2: {{command: ['{tmp_path}/slow.sh'], timeout: 20s}}", *flags)
    slow = subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", "import sys, urllib.request as u; sys.stdout.buffer.write(u.urlopen(sys.argv[1]).read())",
         f"http://{exporter.address}/metrics"], stdout=subprocess.PIPE,
    )  # fmt: skip
    with (tmp_path / "gate").open("w") as gate:  # opens once the slow scrape reads from it
        refused = exporter.get("/metrics")
        assert refused.status_code == 503
        assert "Limit of concurrent requests reached (1), try again later." in refused.text
        gate.write("go\n")
    output, _ = slow.communicate(timeout=30)
    assert b"pm2_up 1" in output


def test_once_prints_one_scrape() -> None:
    """--once prints the page and ends with 0."""
    done = run("--once", *HOST_ONLY)
    assert done.returncode == 0
    assert "node_load1 " in done.stdout


def test_config_check(tmp_path: Path) -> None:
    """--config.check says whether the files are valid, by exit code and in words."""
    path = tmp_path / "exporter.yml"
    path.write_text("pm2: {home: /srv/pm2}")
    assert run("--config.check", f"--config.file={path}").returncode == 0
    path.write_text("pm2: {hoem: /srv/pm2}")
    wrong = run("--config.check", f"--config.file={path}")
    assert wrong.returncode == 1
    assert wrong.stderr == f"pm2-exporter: {path}:1: pm2.hoem: unknown key; did you mean 'home'?\n"
    path.write_text("collectors: {pm3: true}")
    assert "there is no collector 'pm3'; there are: pm2, process" in run("--config.check", f"--config.file={path}").stderr
    web = tmp_path / "web.yml"
    web.write_text("basic_auth_users: {a: b}")
    assert run("--config.check", f"--web.config.file={web}").returncode == 1


@pytest.mark.parametrize(
    ("flag", "error"),
    [
        ("--web.listen-address=9209", "'9209' is not HOST:PORT"),
        ("--web.listen-address=::1:9209", "an IPv6 address goes in brackets"),
        ("--web.listen-address=127.0.0.1:99999", "is not HOST:PORT"),
        ("--web.telemetry-path=metrics", "is not a path such as /metrics"),
        ("--web.max-requests=-1", "is not a whole number"),
        ("--config.file=", "--config.file: a path is needed"),
        ("--web.config.file=", "--web.config.file: a path is needed"),
        ("--log.level=loud", "invalid choice: 'loud'"),
        ("--collector.pm3", "unrecognized arguments: --collector.pm3"),
        ("--conf=x", "unrecognized arguments"),
    ],
)
def test_wrong_flags(flag: str, error: str) -> None:
    """A flag that cannot be is refused with 2 and the reason."""
    done = run(flag)
    assert done.returncode == 2
    assert error in done.stderr


def test_version() -> None:
    """--version says which one it is."""
    assert re.fullmatch(r"pm2-exporter \d+\.\d+\.\d+\n", run("--version").stdout)


def test_taken_port_is_an_error_in_words(start: "Start") -> None:
    """An address that cannot be listened on ends the program with 1 and names the address."""
    taken = start("", *HOST_ONLY).address
    for cannot in (taken, "192.0.2.1:9", "[2001:db8::1]:9", "no-such-host.invalid:9"):
        done = run(f"--web.listen-address={cannot}", *HOST_ONLY)
        assert done.returncode == 1
        assert done.stderr.startswith(f"pm2-exporter: cannot listen on {cannot}: ")


def test_several_addresses(start: "Start") -> None:
    """--web.listen-address may be repeated, for IPv6 too; each address is logged as one would type it."""
    exporter = start("", *HOST_ONLY, "--web.listen-address=[::1]:0")
    found = re.findall(
        r"address=(\S+):(\d+)", exporter.until(lambda: (text := exporter.log.read_text()).count("listening") == 2 and text)
    )
    assert {host for host, _ in found} == {"127.0.0.1", "[::1]"}
    port = next(port for host, port in found if host == "[::1]")
    assert requests.get(f"http://[::1]:{port}/-/ready", timeout=10).status_code == 200


def test_json_log(start: "Start") -> None:
    """--log.format=json logs one object a line."""
    exporter = start("", *HOST_ONLY, "--log.format=json")
    (listening,) = map(json.loads, exporter.log.read_text().splitlines())
    assert listening["msg"] == "listening"
    assert listening["tls"] is False


def test_users_guard_every_path(start: "Start", tmp_path: Path) -> None:
    """With users in the web config file, no path answers without a password."""
    web = tmp_path / "web.yml"
    web.write_text(f"basic_auth_users: {{prometheus: '{bcrypt.hashpw(b'pw', bcrypt.gensalt(4)).decode()}'}}")
    exporter = start("", *HOST_ONLY, f"--web.config.file={web}")
    for path in ("/", "/metrics", "/probe?target=x", "/-/healthy", "/-/ready", "/none"):
        assert exporter.get(path).status_code == 401
    assert requests.post(f"http://{exporter.address}/-/reload", timeout=10).status_code == 401
    assert exporter.get("/metrics", auth=("prometheus", "pw")).status_code == 200


def test_end_by_signal(start: "Start") -> None:
    """SIGTERM ends it with 0, in order."""
    exporter = start("")
    assert exporter.stop() == 0
    assert "Traceback" not in exporter.log.read_text()
