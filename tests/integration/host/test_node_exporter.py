"""Series by series, this exporter says of the machine what node_exporter says."""

from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.collectors import filesystem, host
from exporter.collectors.filesystem import FilesystemCollector, FilesystemOptions
from exporter.collectors.host import HostCollector, HostOptions
from exporter.exposition import Format, render
from tests.integration.host.conftest import NodeExporter, Page, parse

Start = Callable[..., NodeExporter]
COLLECTORS = ("cpu", "diskstats", "filefd", "loadavg", "meminfo", "netclass", "netdev")
COLLECTORS += ("pressure", "stat", "time", "uname", "vmstat")
ONLY = (
    "--collector.disable-defaults",
    "--web.disable-exporter-metrics",
    *(f"--collector.{name}" for name in COLLECTORS),
)
KERNELS = sorted((Path(__file__).parents[2] / "fixtures" / "host").iterdir())

MiB = 2**20
SLACK = {
    "node_time_seconds": 5.0,
    "node_load1": 2.0,
    "node_load5": 1.0,
    "node_load15": 1.0,
    "node_procs_running": 50,
    "node_procs_blocked": 50,
    "node_filefd_allocated": 2000,
    "node_memory_MemAvailable_bytes": 512 * MiB,
    "node_memory_MemFree_bytes": 512 * MiB,
    "node_memory_Buffers_bytes": 64 * MiB,
    "node_memory_Cached_bytes": 512 * MiB,
    "node_filesystem_free_bytes": 512 * MiB,
    "node_filesystem_avail_bytes": 512 * MiB,
    "node_filesystem_files_free": 50_000,
}
"""Of gauges that move while one looks: how far they may move between two looks. Counters are held between two looks."""


async def ours(collector: HostCollector | FilesystemCollector) -> Page:
    """Return a scrape of one collector."""
    return parse(render(collector.metrics(await collector.read(5)), Format.TEXT, account=None).decode())  # type: ignore[arg-type]


def assert_same(before: Page, theirs: Page, after: Page, descs: set[str]) -> None:
    """Hold that types, series and values are the same for every metric in `descs`; values between `before` and `after`."""
    assert {name: kind for name, kind in theirs.types.items() if name in descs} == after.types
    expected = {series: value for series, value in theirs.samples.items() if series[0] in descs}
    assert set(expected) == set(after.samples)
    for series, value in expected.items():
        slack = SLACK.get(series[0], 1e-6 * (1 + abs(value)))
        low, high = sorted((before.samples.get(series, 0), after.samples[series]))
        assert low - slack <= value <= high + slack, series


def names(module: object) -> set[str]:
    """Return the names of all metrics that a collector module declares."""
    return {desc.name for desc in module.DESCS}  # type: ignore[attr-defined]


@pytest.mark.parametrize("defaults", ["upstream", "debian"])
async def test_the_machine(defaults: str, node_exporter: Start, debian_defaults: dict[str, str]) -> None:
    """On this machine, with upstream's default filters and with Debian's: the same names, types, labels and values."""
    options = HostOptions()
    if defaults == "debian":
        options = HostOptions(
            disk_devices_exclude=debian_defaults["collector.diskstats.device-exclude"],
            network_devices_exclude=debian_defaults.get("collector.netdev.device-exclude", ""),
        )
    theirs = node_exporter(
        *ONLY,
        f"--collector.diskstats.device-exclude={options.disk_devices_exclude}",
        f"--collector.netdev.device-exclude={options.network_devices_exclude}",
        f"--collector.netclass.ignored-devices={options.network_devices_exclude or '^$'}",
    )
    collector = HostCollector(options)
    before = await ours(collector)
    page = theirs.scrape()
    after = await ours(collector)
    assert_same(before, page, after, names(host))
    assert "node_cpu_seconds_total" in after.types


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: str(path.name))
async def test_other_kernels(kernel: Path, node_exporter: Start, tmp_path: Path) -> None:
    """On the /proc of other kernels: exactly the same series, values and gaps."""
    theirs = node_exporter(
        *ONLY,
        f"--path.procfs={kernel}",
        f"--path.sysfs={tmp_path}",
        "--no-collector.netdev.netlink",
        "--collector.netdev.device-exclude=",
        f"--collector.diskstats.device-exclude={HostOptions().disk_devices_exclude}",
    )
    seen = await ours(HostCollector(HostOptions(), kernel, tmp_path))
    page = theirs.scrape()
    # Neither comes from /proc but from the system itself; ours takes the domain name from /proc.
    elsewhere = {"node_time_seconds", "node_uname_info"}
    seen = Page(
        {name: kind for name, kind in seen.types.items() if name not in elsewhere},
        {series: value for series, value in seen.samples.items() if series[0] not in elsewhere},
    )
    assert_same(seen, page, seen, names(host) - elsewhere)


@pytest.mark.parametrize("defaults", ["upstream", "debian"])
async def test_filesystems(defaults: str, node_exporter: Start, debian_defaults: dict[str, str]) -> None:
    """Of this machine's mounts, with either default filters: the same names, types, labels and values."""
    options = FilesystemOptions()
    if defaults == "debian":
        options = FilesystemOptions(
            mount_points_exclude=debian_defaults["collector.filesystem.mount-points-exclude"],
            fs_types_exclude=debian_defaults["collector.filesystem.fs-types-exclude"],
        )
    theirs = node_exporter(
        "--collector.disable-defaults",
        "--web.disable-exporter-metrics",
        "--collector.filesystem",
        f"--collector.filesystem.mount-points-exclude={options.mount_points_exclude}",
        f"--collector.filesystem.fs-types-exclude={options.fs_types_exclude}",
    )
    collector = FilesystemCollector(options)
    before = await ours(collector)
    page = theirs.scrape()
    after = await ours(collector)
    assert_same(before, page, after, names(filesystem))
    assert "node_filesystem_size_bytes" in after.types
