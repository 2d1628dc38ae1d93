"""Real Prometheus servers scrape the exporter of a real estate, and promtool reads its page, without a complaint."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bcrypt
import pytest
import requests
import trustme
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

if TYPE_CHECKING:
    from tests.integration.conftest import PM2
    from tests.integration.face.conftest import Exporter, Start

ROOT = Path(__file__).parents[3]
NEWER = ROOT / ".state" / "tools-sid" / "usr" / "bin"
SERVERS = {"this suite's": shutil.which("prometheus"), "newest": str(NEWER / "prometheus")}
APP = "require('http').createServer((q, r) => r.end('{\"status\":\"healthy\"}')).listen(%d, '127.0.0.1')"


def free_port() -> int:
    """Return a port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def exporter(start: "Start", pm2_daemon: "PM2", tmp_path: Path) -> "Exporter":
    """Start an exporter with every collector on: three apps with odd names, a probe, a directory."""
    port = free_port()
    idle = str(pm2_daemon.file("idle.js", "setInterval(() => {}, 1000)"))
    pm2_daemon.start(
        {"name": "web", "source": APP % port},
        {"name": 'odd "name" \\ {x="y"}', "script": idle},
        {"name": "çà va 🙂", "script": idle, "exec_mode": "cluster", "instances": 2},
    )
    return start(
        f"""
        pm2: {{home: {pm2_daemon.home}, apps: {{web: {{instances: 1}}, missing: {{}}}}}}
        http: {{targets: [{{url: 'http://127.0.0.1:{port}/', app: web}}, {{url: 'http://127.0.0.1:9/'}}]}}
        directory: {{paths: [{{path: {tmp_path}}}]}}
        mongodb: {{uri: 'mongodb://127.0.0.1:9/'}}
        """
    )


def test_promtool_and_openmetrics_have_no_complaint(exporter: "Exporter") -> None:
    """The whole page passes promtool's lint and the OpenMetrics parser, and no sample had to be dropped."""
    exporter.until(lambda: exporter.scrape().value("pm2_directory_files") is not None)
    page = exporter.scrape()
    assert not page.failed()
    assert page.value("pm2_exporter_samples_dropped", reason="duplicate") == 0
    assert page.value("pm2_exporter_samples_dropped", reason="invalid") == 0
    for promtool in {shutil.which("promtool"), str(NEWER / "promtool")}:
        assert promtool
        done = subprocess.run([promtool, "check", "metrics"], input=page.text, capture_output=True, text=True, check=False)  # noqa: S603
        complaints = [line for line in (done.stdout + done.stderr).splitlines() if not _mirrored(line)]
        assert not complaints
    opened = exporter.get("/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0"}).text
    assert len(list(parse_openmetrics(opened))) > 100


def _mirrored(complaint: str) -> bool:
    """Tell complaints about names that established exporters have fixed long ago, which must stay as they are."""
    return complaint.startswith(("node_", "mongodb_", "probe_"))


@pytest.fixture(params=SERVERS)
def binary(request: pytest.FixtureRequest) -> str:
    """Return the program of each Prometheus."""
    found = SERVERS[request.param]
    if not found or not Path(found).exists():
        assert not os.environ.get("CI"), f"{request.param} Prometheus is missing"
        pytest.skip(f"{request.param} Prometheus is not on this machine")
    return found


def test_prometheus_has_no_complaint(exporter: "Exporter", binary: str, tmp_path: Path) -> None:
    """A real Prometheus scrapes the estate: the target is up, every series is stored, nothing is logged as wrong."""
    with prometheus(binary, exporter, tmp_path, {}) as (url, log):
        answer = exporter.until(lambda: query(url, "sum_over_time(up[1m]) > 3"))
        assert answer
        target = requests.get(f"{url}/api/v1/targets", timeout=10).json()["data"]["activeTargets"][0]
        assert (target["health"], target["lastError"]) == ("up", "")
        assert query(url, "min_over_time(up[1m])")[0]["value"][1] == "1"
        stored = float(query(url, "scrape_samples_post_metric_relabeling")[0]["value"][1])
        assert stored == float(query(url, "scrape_samples_scraped")[0]["value"][1]) > 300
        names = {row["metric"]["name"] for row in query(url, "pm2_process_resident_memory_bytes > 0")}
        assert names == {"web", 'odd "name" \\ {x="y"}', "çà va 🙂"}
        metadata = requests.get(f"{url}/api/v1/metadata", timeout=10).json()["data"]
        assert metadata["pm2_process_restarts"][0]["type"] == "counter"
    bad = [line for line in log.read_text().splitlines() if "level=warn" in line.lower() or "level=error" in line.lower()]
    assert not [line for line in bad if "scrape" in line]


def test_prometheus_scrapes_behind_tls_and_password(start: "Start", binary: str, tmp_path: Path) -> None:
    """With a client certificate and a password a real Prometheus scrapes, across a change of the server's certificate."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert("prometheus").private_key_and_cert_chain_pem.write_to_path(tmp_path / "client.pem")

    def renew() -> None:
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")

    renew()
    client = "client_auth_type: RequireAndVerifyClientCert, client_ca_file: ca.pem"
    tls = f"{{cert_file: server.pem, key_file: server.pem, {client}}}"
    password = bcrypt.hashpw(b"s3cr3t", bcrypt.gensalt(4)).decode()
    (tmp_path / "web.yml").write_text(f"tls_server_config: {tls}\nbasic_auth_users: {{prometheus: '{password}'}}")
    flags = (f"--web.config.file={tmp_path}/web.yml", "--collector.disable-defaults", "--collector.host")
    files = {"ca_file": "ca.pem", "cert_file": "client.pem", "key_file": "client.pem"}
    job = {"scheme": "https", "tls_config": {key: f"{tmp_path}/{name}" for key, name in files.items()}}
    exporter = start("", *flags)
    with prometheus(
        binary, exporter, tmp_path, {**job, "basic_auth": {"username": "prometheus", "password": "s3cr3t"}}
    ) as (url, _):
        exporter.until(lambda: query(url, "sum_over_time(up[1m]) > 1"))
        renew()
        exporter.until(lambda: query(url, "sum_over_time(up[1m]) > 2"))
        assert query(url, "min_over_time(up[1m])")[0]["value"][1] == "1"
    with prometheus(binary, exporter, tmp_path, job) as (url, _):
        exporter.until(lambda: query(url, 'up{job="pm2"} == 0'))
        target = requests.get(f"{url}/api/v1/targets", timeout=10).json()["data"]["activeTargets"][0]
        assert "401" in target["lastError"]


def query(url: str, expression: str) -> list[dict[str, Any]]:
    """Return the result of an instant query."""
    answer = requests.get(f"{url}/api/v1/query", params={"query": expression}, timeout=10).json()
    assert answer["status"] == "success", answer
    result: list[dict[str, Any]] = answer["data"]["result"]
    return result


@contextlib.contextmanager
def prometheus(binary: str, exporter: "Exporter", folder: Path, job: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    """Run a Prometheus that scrapes `exporter` every second, as `job` says; yield its URL and its log."""
    jobs = [{**job, "job_name": "pm2", "static_configs": [{"targets": [exporter.address]}]}]
    config, log, url = folder / "prometheus.yml", folder / "prometheus.log", f"http://127.0.0.1:{free_port()}"
    config.write_text(json.dumps({"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": jobs}))
    flags = [f"--config.file={config}", f"--storage.tsdb.path={folder}/tsdb", f"--web.listen-address={url[7:]}"]
    with log.open("wb") as sink, subprocess.Popen([binary, *flags], stdout=sink, stderr=sink) as process:  # noqa: S603
        try:
            exporter.until(lambda: _ready(url))
            yield url, log
        finally:
            process.terminate()


def _ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/-/ready", timeout=1).status_code == requests.codes.ok
    except requests.ConnectionError:
        return False
