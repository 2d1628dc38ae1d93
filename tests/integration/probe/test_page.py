"""The collector and /probe against real servers: what a scrape sees of good, slow, hanging and forbidden targets."""

import asyncio
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from exporter.collectors.http import HttpCollector, HttpOptions, HttpTarget, answer_probe
from exporter.exposition import Format, render
from exporter.grammar import Duration
from exporter.probe.module import HttpProber, ProbeModule, ProbeTLS
from exporter.probe.result import Reason

if TYPE_CHECKING:
    from tests.integration.probe.conftest import Site

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def ask(options: HttpOptions, **query: str) -> tuple[str, str, int]:
    """Answer a request for /probe; return the page, its content type and its status."""
    page, kind, status = await answer_probe(options, query, 5.0, Format.TEXT)
    return page.decode(), kind.value if isinstance(kind, Format) else kind, status


def promtool(page: str) -> None:
    """Hold a page against `promtool check metrics`, which knows names, types and help."""
    command = shutil.which("promtool")
    if command is None:
        pytest.skip("promtool is not installed")
    checked = subprocess.run(  # noqa: S603 -- the tool just found
        [command, "check", "metrics"], input=page, text=True, capture_output=True, check=False
    )
    assert checked.stdout + checked.stderr == ""


async def test_probe_page(site: "Site") -> None:
    """/probe answers with the probe's metrics only, in the format asked for, and promtool finds nothing wrong."""
    site.routes["/"] = OK
    page, kind, status = await ask(HttpOptions(), target=f"127.0.0.1:{site.port}")
    assert status == 200
    assert kind == "text/plain; version=0.0.4; charset=utf-8"
    assert "\nprobe_success 1\n" in page
    assert "pm2_" not in page
    promtool(page)
    body, form, _ = await answer_probe(HttpOptions(), {"target": site.url}, 5.0, Format.OPENMETRICS)
    assert form is Format.OPENMETRICS
    assert body.endswith(b"# EOF\n")


async def test_bad_requests(site: "Site") -> None:
    """Requests that cannot be understood are a 400 in plain words, and nothing is asked of anybody."""
    good = {"target": site.url}
    for query, text in (
        ({}, "Target parameter is missing\n"),
        (good | {"module": "x"}, "Unknown module: there is no module 'x'; there are: http_2xx\n"),
        (good | {"hostname": "a b"}, "Hostname parameter is no host name\n"),
        (good | {"hostname": "a\r\nX: y"}, "Hostname parameter is no host name\n"),
        ({"target": "ftp://x"}, "Target parameter is wrong: only http:// and https:// can be probed, not ftp://\n"),
    ):
        page, kind, status = await ask(HttpOptions(), **query)
        assert (page, status) == (text, 400)
        assert kind.startswith("text/plain")
    assert not site.asked


async def test_forbidden(site: "Site") -> None:
    """What is not listed is a 403, whether its address is known at once or only by looking its name up."""
    elsewhere = HttpOptions(allow=("192.0.2.0/24",))
    for target in (site.url, f"localhost:{site.port}", "169.254.169.254"):
        page, _, status = await ask(elsewhere, target=target)
        assert status == 403, target
        assert "not in the list of what may be probed" in page or "metadata" in page
    assert not site.asked


async def test_forbidden_redirect(site: "Site", tls_site: "Site") -> None:
    """A redirect to what is not listed is not followed; the page says why, and the other side hears nothing."""
    site.routes["/"] = f"HTTP/1.1 302 Found\r\nLocation: {tls_site.url}/admin\r\nContent-Length: 0\r\n\r\n".encode()
    only = HttpOptions(allow=(site.url,))
    page, _, status = await ask(only, target=site.url)
    assert status == 200
    assert "\nprobe_success 0\n" in page
    assert 'probe_failure_reason{reason="refused_target"} 1\n' in page
    assert not tls_site.asked


async def test_metadata_redirect(site: "Site") -> None:
    """No target, configured or not, can redirect a probe to a cloud metadata service."""
    site.routes["/"] = b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/latest/\r\nContent-Length: 0\r\n\r\n"
    everywhere = HttpOptions(targets=(HttpTarget(url=site.url),), allow=("0.0.0.0/0", "::/0"))
    ((_, found),) = await HttpCollector(everywhere).read(5)
    assert found
    assert found.reason is Reason.REFUSED_TARGET
    page, _, _ = await ask(everywhere, target=site.url)
    assert 'probe_failure_reason{reason="refused_target"} 1\n' in page


async def test_configured_target(site: "Site") -> None:
    """A configured target may be asked for on /probe by its very URL, without its credentials."""
    site.routes["/health"] = OK
    options = HttpOptions(targets=(HttpTarget(url=f"user:secret@127.0.0.1:{site.port}/health"),), allow=())
    assert (await ask(options, target=f"{site.url}/health"))[2] == 200
    assert (await ask(options, target=f"{site.url}/"))[2] == 403
    assert b"Authorization" not in site.asked[0]


async def test_debug(site: "Site") -> None:
    """?debug=true tells the whole story in plain text, without credentials or query strings."""
    site.routes["/"] = b"HTTP/1.1 302 Found\r\nLocation: /next?session=secret\r\nContent-Length: 0\r\n\r\n"
    site.routes["/next"] = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"
    page, kind, status = await ask(HttpOptions(), target=f"user:secret@127.0.0.1:{site.port}/?token=secret", debug="true")
    assert (kind, status) == ("text/plain; charset=utf-8", 200)
    assert "secret" not in page
    for told in (
        'msg="Received redirect" location="http://127.0.0.1',
        'reason=status detail="the status is 500, wanted is 2xx"',
        'msg="Response timings for roundtrip" roundtrip=1',
        "\nprobe_http_redirects 1\n",
        "\nModule configuration:\nprober: http\n",
    ):
        assert told.replace('location="', "location=") in page or told in page, told


async def test_side_by_side(site: "Site", deaf_site: "Site", closed_port: int) -> None:
    """A target that hangs, one where nothing listens and a good one each have their own truth in the same scrape."""
    site.routes["/"] = OK
    options = HttpOptions(
        modules={"quick": ProbeModule(timeout=Duration(0.3))},
        targets=(
            HttpTarget(url=deaf_site.url, module="quick", app="hangs"),
            HttpTarget(url=f"127.0.0.1:{closed_port}", app="down"),
            HttpTarget(url=site.url, app="fine"),
        ),
    )
    collector = HttpCollector(options)
    seen = await collector.read(5)
    assert [found.reason if found else "none" for _, found in seen] == [Reason.TIMEOUT, Reason.CONNECTION_REFUSED, None]
    page = render(collector.metrics(seen), Format.TEXT).decode()
    promtool(page)
    assert f'probe_success{{target="http://127.0.0.1:{site.port}/",module="http_2xx",app="fine"}} 1\n' in page
    assert 'module="quick",app="hangs",reason="timeout"} 1\n' in page
    assert 'app="hangs",phase="processing"} 0' in page


async def test_deadline_first(site: "Site", deaf_site: "Site") -> None:
    """Targets that others leave no time for are counted as skipped; they are not called down."""
    site.routes["/"] = OK
    targets = [HttpTarget(url=f"{deaf_site.url}/{number}") for number in range(2)]
    options = HttpOptions(targets=(*targets, HttpTarget(url=site.url)), concurrency=1)
    collector = HttpCollector(options)
    async with asyncio.timeout(5):
        seen = await collector.read(0.4)
    assert [found.reason if found else "none" for _, found in seen] == [Reason.TIMEOUT, "none", "none"]
    page = render(collector.metrics(seen), Format.TEXT).decode()
    assert "pm2_exporter_http_probes_skipped 2\n" in page
    assert f":{site.port}/" not in page


async def test_concurrency(site: "Site") -> None:
    """No more targets are probed at the same time than the options say."""
    now = most = 0

    async def slow(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        writer.write(OK)
        await writer.drain()

    targets = tuple(HttpTarget(url=f"{site.url}/{number}") for number in range(9))
    site.routes.update({f"/{number}": slow for number in range(9)})
    seen = await HttpCollector(HttpOptions(targets=targets, concurrency=3)).read(5)
    assert all(found and found.success for _, found in seen)
    assert most == 3


@pytest.fixture
def few_descriptors() -> Iterator[list[int]]:
    """Leave this process no descriptor to open until what is in the list is closed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
    taken: list[int] = []
    yield taken
    for number in taken:
        os.close(number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_no_descriptors(site: "Site", few_descriptors: list[int]) -> None:
    """Without a descriptor left the target is not called down: the exporter says that it did not look, and recovers."""
    site.routes["/"] = OK
    collector = HttpCollector(HttpOptions(targets=(HttpTarget(url=site.url),)))
    while True:
        try:
            few_descriptors.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            break
    ((_, found),) = await collector.read(5)
    assert found is None
    while few_descriptors:
        os.close(few_descriptors.pop())
    ((_, found),) = await collector.read(5)
    assert found
    assert found.success


def _held() -> tuple[int, int]:
    return len(list(Path("/proc/self/fd").iterdir())), len(asyncio.all_tasks())


async def test_no_leaks(site: "Site", tls_site: "Site", deaf_site: "Site") -> None:
    """Hundreds of probes, good, failing and timing out, overlapping, leave no descriptor and no task behind."""
    site.routes["/"] = tls_site.routes["/"] = OK
    options = HttpOptions(
        modules={
            "open": ProbeModule(http=HttpProber(tls_config=ProbeTLS(insecure_skip_verify=True))),
            "quick": ProbeModule(timeout=Duration(0.02)),
        },
        targets=(
            HttpTarget(url=site.url),
            HttpTarget(url=f"localhost:{site.port}", module="quick"),
            HttpTarget(url=tls_site.url, module="open"),
            HttpTarget(url=tls_site.url),
            HttpTarget(url=deaf_site.url, module="quick"),
        ),
    )
    collector = HttpCollector(options)
    await collector.read(5)
    await asyncio.sleep(0.1)
    before = _held()
    for _ in range(20):
        await asyncio.gather(*[collector.read(5) for _ in range(3)])
    async with asyncio.timeout(10):
        while _held() > before:  # noqa: ASYNC110 -- the system's count
            await asyncio.sleep(0.05)
