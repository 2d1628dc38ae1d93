"""The machine's figures: kernels from 3.4 to 6.18, files that are missing, and text that is no such file at all."""

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.collectors import host
from exporter.collectors.host import DESCS, Host, HostCollector, HostOptions
from exporter.exposition import Format, render
from exporter.grammar import ConfigError, decode

KERNELS = Path(__file__).parents[2] / "fixtures" / "host"
PARSERS: Mapping[str, Callable[[str], object]] = {
    "stat": host.parse_stat,
    "loadavg": host.parse_loadavg,
    "meminfo": host.parse_meminfo,
    "vmstat": host.parse_vmstat,
    "pressure/io": host.parse_pressure,
    "diskstats": host.parse_diskstats,
    "net/dev": host.parse_net_dev,
    "sys/fs/file-nr": host.parse_file_nr,
}


async def scrape(proc: Path, options: HostOptions | None = None, sys: Path = Path("/nowhere")) -> dict[str, str]:
    """Return each sample of one scrape of a /proc, as text."""
    collector = HostCollector(options or HostOptions(), proc, sys)
    page = render(collector.metrics(await collector.read(1)), Format.TEXT, account=None).decode()
    return dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))


def names(samples: Mapping[str, str]) -> set[str]:
    """Return the names without their labels."""
    return {sample.partition("{")[0] for sample in samples}


SEEN_ON = {
    "linux-6.18": {
        'node_cpu_seconds_total{cpu="1",mode="idle"}',
        "node_memory_MemAvailable_bytes",
        "node_vmstat_oom_kill",
        "node_pressure_cpu_waiting_seconds_total",
        "node_pressure_memory_stalled_seconds_total",
        "node_load15",
        'node_disk_io_time_seconds_total{device="vda"}',
        "node_filefd_maximum",
    },
    "linux-6.1": {"node_vmstat_oom_kill", 'node_disk_reads_completed_total{device="ubda"}', "node_load1"},
    "linux-4.18": {"node_vmstat_oom_kill", "node_memory_MemAvailable_bytes", "node_filefd_allocated"},
    "linux-4.1": {"node_memory_MemAvailable_bytes", "node_boot_time_seconds"},
    "linux-3.4": {"node_memory_MemFree_bytes", "node_vmstat_pgmajfault", 'node_cpu_seconds_total{cpu="0",mode="steal"}'},
}
NOT_ON = {
    "linux-6.18": set(),
    "linux-6.1": {"node_pressure_cpu_waiting_seconds_total", "node_pressure_io_stalled_seconds_total"},
    "linux-4.18": {"node_pressure_cpu_waiting_seconds_total"},
    "linux-4.1": {"node_vmstat_oom_kill", "node_pressure_cpu_waiting_seconds_total"},
    "linux-3.4": {"node_memory_MemAvailable_bytes", "node_vmstat_oom_kill"},
}


@pytest.mark.parametrize("kernel", sorted(SEEN_ON))
async def test_every_kernel_gives_what_it_has_and_nothing_it_has_not(kernel: str) -> None:
    """What a kernel does not tell is left out, never written as 0."""
    samples = await scrape(KERNELS / kernel)
    assert SEEN_ON[kernel] <= set(samples)
    assert not NOT_ON[kernel] & names(samples)


async def test_values_have_base_units() -> None:
    """Ticks, KiB, sectors, ms and µs become seconds and bytes; worked out by hand from the files of Linux 4.18 and 6.18."""
    old, new = await scrape(KERNELS / "linux-4.18"), await scrape(KERNELS / "linux-6.18")
    assert old['node_cpu_seconds_total{cpu="0",mode="user"}'] == "60.88"
    assert old['node_cpu_seconds_total{cpu="1",mode="softirq"}'] == "13.12"
    assert old["node_memory_MemTotal_bytes"] == str(8164548 * 1024)
    assert old['node_disk_read_bytes_total{device="sda"}'] == str(856916 * 512)
    assert old['node_disk_written_bytes_total{device="sda"}'] == str(2253152 * 512)
    assert old['node_disk_read_time_seconds_total{device="sda"}'] == "3.507"
    assert old['node_disk_io_time_seconds_total{device="sda"}'] == "8.217"
    assert old['node_network_receive_bytes_total{device="eth0"}'] == "281233043"
    assert old['node_network_transmit_packets_total{device="eth0"}'] == "175179"
    assert old["node_context_switches_total"] == "5562073"
    assert old["node_filefd_allocated"] == "1408"
    stalled = re.search(r"full .*total=(\d+)", (KERNELS / "linux-6.18" / "pressure" / "io").read_text())
    assert stalled is not None
    assert float(new["node_pressure_io_stalled_seconds_total"]) == int(stalled[1]) / 1e6


async def test_partitions_and_memory_devices_are_left_out_by_default() -> None:
    """The whole disk is reported, its partitions and loop devices are not; an empty expression reports them all."""
    usual = await scrape(KERNELS / "linux-3.4")
    assert 'node_disk_reads_completed_total{device="mmcblk0"}' in usual
    assert 'node_disk_reads_completed_total{device="loop0"}' not in usual
    every = await scrape(KERNELS / "linux-3.4", HostOptions(disk_devices_exclude=""))
    assert 'node_disk_reads_completed_total{device="loop0"}' in every
    partitions = await scrape(KERNELS / "linux-4.18")
    assert 'node_disk_reads_completed_total{device="sda1"}' not in partitions


async def test_network_interfaces_can_be_left_out(tmp_path: Path) -> None:
    """An excluded interface is in none of the network metrics, its state included."""
    for name, state in (("lo", "unknown"), ("eth0", "up")):
        (tmp_path / "class" / "net" / name).mkdir(parents=True)
        (tmp_path / "class" / "net" / name / "operstate").write_text(f"{state}\n")
    (tmp_path / "class" / "net" / "bonding_masters").write_text("bond0\n")
    every = await scrape(KERNELS / "linux-4.18", sys=tmp_path)
    assert every['node_network_up{device="eth0"}'] == "1"
    assert every['node_network_up{device="lo"}'] == "0"
    assert not any("bonding_masters" in sample for sample in every)
    kept = await scrape(KERNELS / "linux-4.18", HostOptions(network_devices_exclude="^lo$"), tmp_path)
    assert {sample for sample in every if 'device="lo"' in sample} == set(every) - set(kept)


@pytest.mark.parametrize("lost", [*PARSERS, "pressure/cpu", "pressure/memory"])
async def test_a_missing_file_costs_its_own_metrics_only(lost: str, tmp_path: Path) -> None:
    """Each file of /proc taken away takes its samples with it and leaves every other sample as it was."""
    whole = KERNELS / "linux-6.18"
    shutil.copytree(whole, tmp_path / "proc")
    (tmp_path / "proc" / lost).unlink()
    before, after = await scrape(whole), await scrape(tmp_path / "proc")
    gone = set(before) - set(after)
    assert gone
    assert {name.split("_")[1] for name in gone} <= {
        "stat": {"cpu", "context", "boot", "procs"},
        "loadavg": {"load1", "load5", "load15"},
        "meminfo": {"memory"},
        "vmstat": {"vmstat"},
        "diskstats": {"disk"},
        "net/dev": {"network"},
        "sys/fs/file-nr": {"filefd"},
    }.get(lost, {"pressure"})
    assert all(after[sample] == before[sample] for sample in after if not sample.startswith("node_time_seconds"))


@pytest.mark.parametrize("bad", [b"", b"\0\xff\n:::\n", b"cpu0 x y z\nMemTotal: -5 kB\n 8 0 sda a b c d e f g h i j k\n"])
@pytest.mark.parametrize("name", sorted(PARSERS))
async def test_a_garbled_file_costs_its_own_metrics_only(name: str, bad: bytes, tmp_path: Path) -> None:
    """A file full of nonsense takes no other file's samples with it."""
    shutil.copytree(KERNELS / "linux-6.18", tmp_path / "proc")
    (tmp_path / "proc" / name).write_bytes(bad)
    before, after = await scrape(KERNELS / "linux-6.18"), await scrape(tmp_path / "proc")
    assert set(after) < set(before)


async def test_no_proc_at_all_is_a_failure(tmp_path: Path) -> None:
    """A machine without /proc is a failed collector, not a page of nothing."""
    with pytest.raises(OSError, match="nothing to read"):
        await HostCollector(HostOptions(), tmp_path, tmp_path).read(1)


async def test_everything_emitted_is_declared() -> None:
    """Every sample's metric is among DESCS with as many labels as declared, and no name is declared twice."""
    collector = HostCollector(HostOptions())
    assert len({desc.name for desc in DESCS}) == len(DESCS)
    for desc, rows in collector.metrics(await collector.read(1)):
        assert desc in DESCS
        assert all(len(labels) == len(desc.labels) for labels, _ in rows)


CORPUS = {name: [path.read_text() for path in KERNELS.glob(f"*/{name}")] for name in PARSERS}


@given(st.data())
def test_parsers_never_raise(data: st.DataObject) -> None:
    """Any text, and any real file with a piece replaced by any text, is read without raising."""
    name = data.draw(st.sampled_from(sorted(PARSERS)))
    text = data.draw(st.one_of(st.text(), st.sampled_from(CORPUS[name])))
    at, until = sorted((data.draw(st.integers(0, len(text))), data.draw(st.integers(0, len(text)))))
    noise = data.draw(st.one_of(st.text(), st.sampled_from(["9" * 5000, "-1", "1e999", "nan", " ", "\n", ":", "²"])))
    PARSERS[name](text[:at] + noise + text[until:])


@given(st.text(), st.text(), st.text())
def test_whatever_was_read_becomes_metrics(stat: str, disks: str, network: str) -> None:
    """What the parsers make of any text can be rendered."""
    lines = [f"cpu0 {stat}", f"8 0 sda {disks}", f"eth0: {network}"]
    seen = Host(
        now=0,
        stat=host.parse_stat(lines[0]),
        loads=host.parse_loadavg(stat),
        memory=host.parse_meminfo(f"MemTotal: {stat}"),
        vmstat=host.parse_vmstat(f"oom_kill {stat}"),
        pressure={("cpu", "some"): host.parse_pressure(f"some {stat}").get("some")},
        disks=host.parse_diskstats(lines[1]),
        network=host.parse_net_dev(lines[2]),
        network_up={},
        file_handles=host.parse_file_nr(stat),
        uname=("",) * 6,
    )
    assert b"node_time_seconds" in render(HostCollector(HostOptions()).metrics(seen), Format.OPENMETRICS)


def test_an_interface_may_have_a_colon_in_its_name() -> None:
    """The last colon ends the name."""
    assert list(host.parse_net_dev("ibr10:30: " + "0 " * 16)) == ["ibr10:30"]


CPUS = st.dictionaries(st.sampled_from(["0", "1"]), st.lists(st.integers(0, 10**6), min_size=8, max_size=8))


@given(st.lists(CPUS, min_size=1, max_size=8))
def test_cpu_time_never_runs_backwards_by_a_little(rounds: list[dict[str, Sequence[int]]]) -> None:
    """Over any sequence, a CPU's times fall only where its idle time fell by 3 s: it was replaced and starts anew."""
    idle = host.MODES.index("idle")
    shown: Mapping[str, Sequence[int | None]] = {}
    for now in rounds:
        before, shown = shown, host.rising(shown, now)
        assert set(shown) == set(now)
        for cpu, columns in shown.items():
            last = [value or 0 for value in before.get(cpu, ())]
            if last and last[idle] - now[cpu][idle] < 300:
                assert all((new or 0) >= old for new, old in zip(columns, last, strict=True))
            else:
                assert list(columns) == list(now[cpu])


@pytest.mark.parametrize("key", ["disk_devices_exclude", "network_devices_exclude"])
def test_a_wrong_expression_is_a_config_error(key: str) -> None:
    """The error names the key and what is wrong with the expression."""
    with pytest.raises(ConfigError, match=rf"{key}: expected a regular expression: .*unterminated"):
        decode(f"{key}: '(['", HostOptions, file="exporter.yml", environ={})
