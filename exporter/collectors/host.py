"""This machine: CPU, load, memory, pressure, disks, network, file handles, with node_exporter's names, types and meaning.

Each /proc file is read whole and parsed by a pure function that never raises; a file or a field that this kernel does not
have costs its own metrics and nothing else. The files are read directly: psutil knows neither pressure nor the event
counters, counts reclaimable slabs as cached memory, estimates MemAvailable where the kernel does not tell, and costs more.

Sources: proc(5), Documentation/admin-guide/iostats.rst and Documentation/accounting/psi.rst of the Linux kernel.
"""

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from exporter.exposition import Desc, Metric, counter, gauge, single, untyped
from exporter.grammar import Regex, Strict, default

MODES = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
"""What a CPU does, in the order of /proc/stat's columns."""
MEMORY = ("MemTotal", "MemAvailable", "MemFree", "Buffers", "Cached", "SwapTotal", "SwapFree")
VMSTAT = ("oom_kill", "pgmajfault")
PRESSURES = ("cpu", "memory", "io")

_CPU = counter(
    "node_cpu_seconds_total", "Seconds the CPUs spent in each mode.", ("cpu", "mode"), source="/proc/stat, per CPU"
)
_CONTEXT_SWITCHES = counter("node_context_switches_total", "Context switches since boot.", source="/proc/stat ctxt")
_BOOT_TIME = gauge("node_boot_time_seconds", "When the machine was booted, as Unix time.", source="/proc/stat btime")
_PROCS_RUNNING = gauge("node_procs_running", "Threads that run or want to run.", source="/proc/stat procs_running")
_PROCS_BLOCKED = gauge("node_procs_blocked", "Threads that wait for I/O.", source="/proc/stat procs_blocked")
_TIME = gauge("node_time_seconds", "This machine's clock, as Unix time.", source="the system clock")
_LOADS = tuple(
    gauge(f"node_load{minutes}", f"Load average over {minutes} min.", source="/proc/loadavg") for minutes in (1, 5, 15)
)
_MEMORY = {
    name: gauge(f"node_memory_{name}_bytes", f"Memory information field {name}.", source=f"/proc/meminfo {name}")
    for name in MEMORY
}
_VMSTAT = {
    name: untyped(f"node_vmstat_{name}", f"Virtual memory event counter {name}.", source=f"/proc/vmstat {name}")
    for name in VMSTAT
}
_PRESSURE = {
    (resource, line): counter(
        f"node_pressure_{resource}_{word}_seconds_total",
        f"Seconds in which {who} waited for {what}.",
        source=f"/proc/pressure/{resource} {line} total",
    )
    for resource, what in (("cpu", "CPU time"), ("memory", "memory"), ("io", "I/O"))
    for line, word, who in (("some", "waiting", "at least one task"), ("full", "stalled", "every task that was not idle"))
    if (resource, line) != ("cpu", "full")  # has no meaning for a whole machine
}
_SECTOR, _PER_MS = 512, 0.001
_DISK = tuple(
    (column, scale, counter(f"node_disk_{name}_total", text, ("device",), source=f"/proc/diskstats column {column + 1}"))
    for column, scale, name, text in (
        (3, 1, "reads_completed", "Reads completed."),
        (5, _SECTOR, "read_bytes", "Bytes read."),
        (6, _PER_MS, "read_time_seconds", "Seconds spent by all reads."),
        (7, 1, "writes_completed", "Writes completed."),
        (9, _SECTOR, "written_bytes", "Bytes written."),
        (10, _PER_MS, "write_time_seconds", "Seconds spent by all writes."),
        (12, _PER_MS, "io_time_seconds", "Seconds in which the device had I/O under way."),
    )
)
_NETWORK = tuple(
    (
        column + offset,
        counter(f"node_network_{way}_{name}_total", text, ("device",), source=f"/proc/net/dev {way} {name}"),
    )
    for way, offset in (("receive", 0), ("transmit", 8))
    for column, name, text in (
        (0, "bytes", f"Bytes: {way}."),
        (1, "packets", f"Packets: {way}."),
        (2, "errs", f"Errors: {way}."),
        (3, "drop", f"Packets dropped: {way}."),
    )
)
_NETWORK_UP = gauge(
    "node_network_up", "1 if the interface's operational state is up.", ("device",), source="/sys/class/net/*/operstate"
)
_FILEFD_ALLOCATED = gauge("node_filefd_allocated", "File handles in use.", source="/proc/sys/fs/file-nr")
_FILEFD_MAXIMUM = gauge("node_filefd_maximum", "File handles that may be in use at most.", source="/proc/sys/fs/file-nr")
_UNAME = gauge(
    "node_uname_info",
    "What uname(2) says of this machine; always 1.",
    ("sysname", "release", "version", "machine", "nodename", "domainname"),
    source="uname(2)",
)

DESCS: tuple[Desc, ...] = (
    _CPU,
    _CONTEXT_SWITCHES,
    _BOOT_TIME,
    _PROCS_RUNNING,
    _PROCS_BLOCKED,
    _TIME,
    *_LOADS,
    *_MEMORY.values(),
    *_VMSTAT.values(),
    *_PRESSURE.values(),
    *(desc for _, _, desc in _DISK),
    *(desc for _, desc in _NETWORK),
    _NETWORK_UP,
    _FILEFD_ALLOCATED,
    _FILEFD_MAXIMUM,
    _UNAME,
)


class HostOptions(Strict, frozen=True, kw_only=True):
    r"""This machine (`node_cpu_*`, `node_memory_*`, `node_disk_*`, `node_network_*` and others)."""

    disk_devices_exclude: Regex = default(Regex(r"^(z?ram|loop|fd|(h|s|v|xv)d[a-z]|nvme\d+n\d+p)\d+$"))
    """Block devices to leave out: a regular expression, searched in the name; "" leaves none out. Default: memory and loop
    devices and partitions, as node_exporter does."""
    network_devices_exclude: Regex = default(Regex())
    """Network interfaces to leave out: a regular expression, searched in the name. Default: none."""


Count = int | None
"""A number of the kernel's, or None where it is not there or is no such number."""


class Stat(NamedTuple):
    """What /proc/stat says; `cpus` maps a CPU's number to hundredths of seconds in the order of MODES."""

    cpus: Mapping[str, Sequence[Count]]
    context_switches: Count
    boot_time: Count
    procs_running: Count
    procs_blocked: Count


class Host(NamedTuple):
    """What was seen; a mapping is empty and a value None where the kernel did not say."""

    now: float
    stat: Stat
    loads: Sequence[float | None]
    memory: Mapping[str, Count]
    vmstat: Mapping[str, Count]
    pressure: Mapping[tuple[str, str], Count]
    disks: Mapping[str, Sequence[Count]]
    network: Mapping[str, Sequence[Count]]
    network_up: Mapping[str, bool]
    file_handles: tuple[Count, Count]
    uname: tuple[str, ...]


class HostCollector:
    """Reads /proc and /sys."""

    descs = DESCS

    def __init__(self, options: HostOptions, proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> None:
        """Look below `proc` and `sys`."""
        self._proc, self._net = f"{proc}/", f"{sys}/class/net/"
        self._no_disk = re.compile(options.disk_devices_exclude or r"(?!)")
        self._no_network = re.compile(options.network_devices_exclude or r"(?!)")
        self._cpus: Mapping[str, Sequence[Count]] = {}

    async def read(self, within: float) -> Host:  # noqa: ARG002 -- the kernel answers from memory
        """Read all files once; raise OSError when there is no /proc at all."""
        stat = parse_stat(self._text("stat"))
        self._cpus = rising(self._cpus, stat.cpus)
        pressure = {}
        for resource in PRESSURES:
            for line, total in parse_pressure(self._text(f"pressure/{resource}")).items():
                pressure[resource, line] = total
        seen = Host(
            now=time.time(),
            stat=stat._replace(cpus=self._cpus),
            loads=parse_loadavg(self._text("loadavg")),
            memory=parse_meminfo(self._text("meminfo")),
            vmstat=parse_vmstat(self._text("vmstat")),
            pressure=pressure,
            disks=self._kept(parse_diskstats(self._text("diskstats")), self._no_disk),
            network=self._kept(parse_net_dev(self._text("net/dev")), self._no_network),
            network_up=dict(self._operational()),
            file_handles=parse_file_nr(self._text("sys/fs/file-nr")),
            uname=self._uname(),
        )
        if not any((stat.cpus, seen.memory, seen.vmstat, seen.disks, seen.network)):
            raise OSError(f"nothing to read in {self._proc}")
        return seen

    def metrics(self, seen: Host) -> Iterable[Metric]:
        """Turn what was seen into metrics. Pure."""
        stat = seen.stat
        yield Metric(
            _CPU,
            [
                ((cpu, mode), None if ticks is None else ticks / 100)
                for cpu, columns in stat.cpus.items()
                for mode, ticks in zip(MODES, columns, strict=False)
            ],
        )
        yield single(_CONTEXT_SWITCHES, stat.context_switches)
        yield single(_BOOT_TIME, stat.boot_time)
        yield single(_PROCS_RUNNING, stat.procs_running)
        yield single(_PROCS_BLOCKED, stat.procs_blocked)
        yield single(_TIME, seen.now)
        yield from map(single, _LOADS, seen.loads)
        for name, desc in _MEMORY.items():
            yield single(desc, seen.memory.get(name))
        for name, desc in _VMSTAT.items():
            yield single(desc, seen.vmstat.get(name))
        for key, desc in _PRESSURE.items():
            total = seen.pressure.get(key)
            yield single(desc, None if total is None else total / 1_000_000)
        disks = [((device,), columns) for device, columns in seen.disks.items()]
        for column, scale, desc in _DISK:
            yield Metric(desc, [(label, _scaled(columns[column], scale)) for label, columns in disks])
        interfaces = [((device,), columns) for device, columns in seen.network.items()]
        for column, desc in _NETWORK:
            yield Metric(desc, [(label, columns[column]) for label, columns in interfaces])
        yield Metric(_NETWORK_UP, [((device,), int(up)) for device, up in seen.network_up.items()])
        allocated, maximum = seen.file_handles
        yield single(_FILEFD_ALLOCATED, allocated)
        yield single(_FILEFD_MAXIMUM, maximum)
        yield Metric(_UNAME, [(seen.uname, 1)])

    def _text(self, name: str) -> str:
        """Return a file of /proc as text; "" where it cannot be read (not in this kernel, PSI off, a container's rule)."""
        return _read(self._proc + name)

    def _kept(self, devices: Mapping[str, Sequence[Count]], excluded: re.Pattern[str]) -> dict[str, Sequence[Count]]:
        return {device: columns for device, columns in devices.items() if not excluded.search(device)}

    def _operational(self) -> Iterator[tuple[str, bool]]:
        try:
            devices = os.listdir(self._net)  # noqa: PTH208 -- names are needed, not paths
        except OSError:
            return
        for device in devices:
            if not self._no_network.search(device) and (state := _read(f"{self._net}{device}/operstate")):
                yield device, state.strip() == "up"

    def _uname(self) -> tuple[str, ...]:
        uname = os.uname()
        domain = self._text("sys/kernel/domainname").strip()
        return uname.sysname, uname.release, uname.version, uname.machine, uname.nodename, domain


def parse_stat(text: str) -> Stat:
    """Read /proc/stat."""
    cpus: dict[str, Sequence[Count]] = {}
    single_values: dict[str, Count] = {}
    for line in text.split("\n"):
        name, _, rest = line.partition(" ")
        if name.startswith("cpu"):
            if name[3:].isdecimal():
                cpus[name[3:]] = [_count(word) for word in rest.split()[: len(MODES)]]
        elif name in ("ctxt", "btime", "procs_running", "procs_blocked"):
            single_values[name] = _count(rest)
    return Stat(cpus, *map(single_values.get, ("ctxt", "btime", "procs_running", "procs_blocked")))


def parse_loadavg(text: str) -> tuple[float | None, ...]:
    """Read /proc/loadavg: the load over 1, 5 and 15 minutes."""
    words = text.split()[:3]
    return tuple(float(word) if re.fullmatch(r"\d{1,9}\.\d{1,9}", word) else None for word in words)


def parse_meminfo(text: str) -> dict[str, Count]:
    """Read the fields of /proc/meminfo that MEMORY names, in bytes."""
    found: dict[str, Count] = {}
    for line in text.split("\n"):
        name, _, rest = line.partition(":")
        if name in MEMORY:
            match rest.split():
                case [word, "kB"] if (kib := _count(word)) is not None:
                    found[name] = kib * 1024
    return found


def parse_vmstat(text: str) -> dict[str, Count]:
    """Read the fields of /proc/vmstat that VMSTAT names."""
    found: dict[str, Count] = {}
    for line in text.split("\n"):
        name, _, rest = line.partition(" ")
        if name in VMSTAT:
            found[name] = _count(rest)
    return found


def parse_pressure(text: str) -> dict[str, Count]:
    """Read a file of /proc/pressure: total microseconds of its lines "some" and "full"."""
    found: dict[str, Count] = {}
    for line in text.split("\n"):
        name, _, rest = line.partition(" ")
        if name in ("some", "full"):
            found[name] = _count(rest.rpartition("total=")[2])
    return found


_DISKSTATS_COLUMNS = 14
"""Columns of Linux 2.6 to 4.17; later kernels append discards and flushes. Partitions of old kernels have fewer."""


def parse_diskstats(text: str) -> dict[str, Sequence[Count]]:
    """Read /proc/diskstats: the columns of each device, the first being the major number; times in ms, sizes in sectors."""
    found: dict[str, Sequence[Count]] = {}
    for line in text.split("\n"):
        words = line.split()
        if len(words) >= _DISKSTATS_COLUMNS:
            found[words[2]] = [_count(word) for word in words[:_DISKSTATS_COLUMNS]]
    return found


_NET_DEV_COLUMNS = 16


def parse_net_dev(text: str) -> dict[str, Sequence[Count]]:
    """Read /proc/net/dev: the eight columns received and the eight transmitted of each interface."""
    found: dict[str, Sequence[Count]] = {}
    for line in text.split("\n"):
        # An interface's name may itself contain a colon.
        name, _, rest = line.rpartition(":")
        words = rest.split()
        if name.strip() and len(words) == _NET_DEV_COLUMNS:
            found[name.strip()] = [_count(word) for word in words]
    return found


def parse_file_nr(text: str) -> tuple[Count, Count]:
    """Read /proc/sys/fs/file-nr: file handles in use, and how many there may be."""
    match text.split():
        case [allocated, _, maximum]:
            return _count(allocated), _count(maximum)
    return None, None


_REPLACED_AFTER = 300
"""Hundredths of seconds; an idle time that fell by this much is a CPU that was taken away and has come back."""


def rising(before: Mapping[str, Sequence[Count]], now: Mapping[str, Sequence[Count]]) -> dict[str, Sequence[Count]]:
    """Return the CPU times of `now`, none below that of `before`: the kernel's idle and iowait sometimes fall a little."""
    idle = MODES.index("idle")
    risen: dict[str, Sequence[Count]] = {}
    for cpu, columns in now.items():
        last = before.get(cpu, ())
        if len(last) > idle < len(columns) and (last[idle] or 0) - (columns[idle] or 0) >= _REPLACED_AFTER:
            last = ()
        risen[cpu] = [
            new if old is None or (new is not None and new >= old) else old
            for new, old in zip(columns, (*last, *[None] * len(columns)), strict=False)
        ]
    return risen


_LARGEST = 2**64 - 1


def _count(word: str) -> Count:
    try:
        number = int(word)
    except ValueError:
        return None
    return number if 0 <= number <= _LARGEST else None


def _scaled(value: Count, scale: float) -> float | None:
    return None if value is None else value * scale


def _read(path: str) -> str:
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 -- half the cost of Path.read_bytes, ten times a scrape
            return file.read().decode("utf-8", "surrogateescape")
    except OSError:
        return ""
