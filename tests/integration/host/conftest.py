"""A node_exporter to compare with: Debian's, on a free loopback port."""

import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families


class Page(NamedTuple):
    """A scrape, taken apart: the type of each metric, and the value of each sample by name and labels."""

    types: dict[str, str]
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]


def parse(text: str) -> Page:
    """Take a page of text format 0.0.4 apart."""
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    samples = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    return Page(types, samples)


class NodeExporter:
    """A running node_exporter."""

    def __init__(self, program: str, *flags: str) -> None:
        """Start it with `flags` and wait until it answers."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/metrics"
        self.process = subprocess.Popen(  # noqa: S603 -- the program found on this machine
            [program, f"--web.listen-address=127.0.0.1:{port}", *flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + 20
        while self.process.poll() is None:
            try:
                self.text()
            except OSError:
                assert time.monotonic() < end, "node_exporter does not answer"
                time.sleep(0.05)
            else:
                return
        pytest.fail(f"node_exporter ended with {self.process.returncode}; flags {flags}")

    def text(self) -> str:
        """Return a scrape as it came."""
        with urllib.request.urlopen(self.url, timeout=10) as answer:  # noqa: S310 -- http, as written above
            return str(answer.read().decode())

    def scrape(self) -> Page:
        """Return a scrape."""
        return parse(self.text())

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(10)


def program() -> str:
    """Return the node_exporter of this machine; skip the test where there is none."""
    for name in ("prometheus-node-exporter", "node_exporter"):
        if found := shutil.which(name):
            return found
    pytest.skip("no node_exporter here (Debian: apt-get install prometheus-node-exporter)")


@pytest.fixture
def node_exporter() -> Iterator[Callable[..., NodeExporter]]:
    """Start node_exporters with the flags given; they end with the test."""
    started: list[NodeExporter] = []

    def start(*flags: str) -> NodeExporter:
        started.append(NodeExporter(program(), *flags))
        return started[-1]

    yield start
    for exporter in started:
        exporter.stop()


@pytest.fixture
def debian_defaults() -> dict[str, str]:
    """Return the default of each flag of this machine's node_exporter that has one, as its help says."""
    done = subprocess.run([program(), "--help"], capture_output=True, text=True, check=False)  # noqa: S603 -- as above
    flags = re.findall(r'--(collector\.[a-z.-]+)="(.*)"', done.stdout + done.stderr)
    return {name: default.replace(r"\\", "\\") for name, default in flags}
