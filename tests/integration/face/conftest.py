"""The exporter as a process, as a user starts it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Page:
    """One scrape, read."""

    def __init__(self, text: str) -> None:
        """Read the text format; raise where it is malformed."""
        self.text = text
        self.series: Series = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                key = (sample.name, frozenset(sample.labels.items()))
                assert key not in self.series, f"the series {key} appears twice"
                self.series[key] = sample.value

    def value(self, name: str, /, **labels: str) -> float | None:
        """Return the value of the one series of that name whose labels include `labels`; None where there is none."""
        found = [
            value for (series, own), value in self.series.items() if series == name and labels.items() <= dict(own).items()
        ]
        assert len(found) <= 1, f"{name}{labels} is {len(found)} series"
        return found[0] if found else None

    def labels(self, name: str) -> list[dict[str, str]]:
        """Return the label sets of every series of that name."""
        return [dict(own) for series, own in self.series if series == name]

    def failed(self) -> set[str]:
        """Return the collectors that say they failed."""
        return {
            dict(own)["collector"]
            for (name, own), value in self.series.items()
            if name == "pm2_exporter_collector_success" and not value
        }


class Exporter:
    """A running pm2-exporter."""

    def __init__(self, arguments: list[str], environ: dict[str, str], log: Path) -> None:
        """Start it on a free port and wait until it listens."""
        self.log = log
        with log.open("wb") as sink:
            self.process = subprocess.Popen(  # noqa: S603 -- arguments of the tests themselves
                [sys.executable, "-m", "exporter", "--web.listen-address=127.0.0.1:0", *arguments],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
            )
        self.scheme = "http"
        self.address = self.until(self._listening)

    def _listening(self) -> str:
        assert self.process.poll() is None, f"the exporter ended:\n{self.log.read_text()}"
        found = re.search(r'(?:msg=listening address=|"msg": "listening", "address": ")([^\s"]+)', self.log.read_text())
        return found[1] if found else ""

    @property
    def pid(self) -> int:
        """Return its process id."""
        return self.process.pid

    def get(self, path: str, **options: object) -> requests.Response:
        """Request a path."""
        return requests.get(f"http://{self.address}{path}", timeout=30, **options)

    def scrape(self, *, timeout: float = 10, **query: object) -> Page:
        """Scrape as Prometheus does, with its deadline, which must be kept."""
        response = requests.get(
            f"http://{self.address}/metrics",
            params=query,
            headers={"X-Prometheus-Scrape-Timeout-Seconds": str(timeout), "Accept": "text/plain;version=0.0.4"},
            timeout=timeout,
        )
        assert response.status_code == 200, response.text
        return Page(response.text)

    def until(self, condition: Callable[[], object], *, within: float = 20) -> object:
        """Poll until `condition` holds; return what it returned."""
        deadline = time.monotonic() + within
        while not (met := condition()):
            if time.monotonic() > deadline:
                pytest.fail(f"not within {within} s; the log says:\n{self.log.read_text()}")
            time.sleep(0.05)
        return met

    def stop(self) -> int:
        """End it as a supervisor would; return its exit code."""
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            return self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


Start = Callable[..., Exporter]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts an exporter with that exporter.yml and those flags."""
    running: list[Exporter] = []

    def begin(config: str = "", *flags: str, home: Path | None = None) -> Exporter:
        number = len(running)
        path = tmp_path / f"exporter-{number}.yml"
        path.write_text(config)
        environ = {**os.environ, "HOME": str(tmp_path), "PM2_HOME": str(home or tmp_path / "no-pm2")}
        running.append(Exporter([f"--config.file={path}", *flags], environ, tmp_path / f"exporter-{number}.log"))
        return running[-1]

    yield begin
    for exporter in running:
        if exporter.process.poll() is None:
            exporter.stop()
