"""PM2's process list and daemon report: the reply's bytes to typed values. Pure.

Only what is used is decoded: the reply is mostly the apps' environments, which are skipped and never kept. PM2 lays an app's
environment variables over its own fields (`Utility.extend(pm2_env, env)`), and metric values come from the apps themselves,
so any field may hold any JSON; whatever is not what it should be counts as not seen. A process without a name or a
number for an id is left out and counted, and hides no other.

Source: PM2's lib/God/Methods.js (getFormatedProcesses) and lib/God/ActionMethods.js (getMonitorData, getReport).
"""

import json
import math
import re
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import msgspec


class Status(StrEnum):
    """The states that PM2 knows (constants.js); a process may one day be in another."""

    ONLINE = "online"
    STOPPING = "stopping"
    STOPPED = "stopped"
    LAUNCHING = "launching"
    ERRORED = "errored"
    WAITING_RESTART = "waiting restart"
    ONE_LAUNCH = "one-launch-status"


class Monitor(msgspec.Struct, frozen=True):
    """One of the figures an app publishes about itself (`pm2_env.axm_monitor`)."""

    name: str
    value: float
    unit: str
    """As written by the app: "ms", "MiB", "req/min", ...; "" where there is none."""


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """One process as PM2 lists it; None is "not said", or said in a way that makes no sense."""

    name: str
    """Not unique: (name, pm_id) is."""
    pm_id: int
    pid: int = 0
    """0 when it is not running."""
    status: str = ""
    """PM2's word for the state, most likely one of Status; "" where it is not said."""
    namespace: str = ""
    exec_mode: str = ""
    """"fork_mode" or "cluster_mode"."""
    version: str = ""
    """Of the app, from its package.json; PM2 writes "N/A" where there is none."""
    interpreter: str = ""
    node_version: str = ""
    user: str = ""
    """The user PM2 started it as (`username`, `uid`), else the daemon's USER."""
    restart_time: int | None = None
    """Restarts of every kind since it was added, or reset."""
    unstable_restarts: int | None = None
    """Restarts in a row that came before min_uptime."""
    started_at: float | None = None
    """Unix time in seconds of the last start (`pm_uptime`), whether or not it still runs."""
    created_at: float | None = None
    """Unix time in seconds when it was added (`created_at`)."""
    cpu: float | None = None
    """Per cent of one core, as PM2 says."""
    memory: int | None = None
    """Resident bytes of the main process, as PM2 says."""
    max_memory_restart: int | None = None
    """Bytes above which PM2 restarts it."""
    autorestart: bool = True
    instances: int | None = None
    """As declared."""
    out_log: str = ""
    err_log: str = ""
    is_module: bool = False
    """A PM2 module (`pm2 install`), no app of the user's."""
    monitors: tuple[Monitor, ...] = ()

    @property
    def is_running(self) -> bool:
        """Whether it has a process of the operating system."""
        return self.pid > 0


class Daemon(msgspec.Struct, frozen=True, kw_only=True):
    """What PM2's daemon (God) says of itself; its environment is never kept."""

    pm2_version: str = ""
    node_version: str = ""
    user: str = ""
    uid: int | None = None
    started_at: float | None = None
    """Unix time in seconds."""
    pid: int | None = None
    """From the kernel, not from the reply; None where it is not in our pid namespace."""


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """One look at PM2."""

    processes: tuple[Process, ...] = ()
    daemon: Daemon | None = None
    """None where the source cannot tell."""
    undecodable: int = 0
    """Entries of the list that could not be read as a process."""
