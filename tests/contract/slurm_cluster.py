"""A Slurm cluster on this machine's loopback: a real controller, nodes that exist in its books only.

    with SlurmCluster(folder, [Pool("h100", 16, leaf=8)]) as cluster:
        cluster.drain("h100-3", "xid 79")
        cluster.occupy("h100-1", gpus=4)
        print(cluster.run("sinfo").stdout)

Without ``running`` there is no slurmd: nodes are of state CLOUD, powered down, which the controller plans
with as with any others and gives to jobs that then stay in CONFIGURING. With ``running`` every node has a
slurmd of its own, on a port of its own, and jobs really run here. Nothing is authenticated (auth/none, which
Debian's slurm-wlm brings): it listens on loopback for the length of a test.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import pytest

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue", "scancel")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@dataclass(frozen=True)
class Pool:
    """``count`` equal nodes ``NAME-1`` ..., a partition of their own of that name, ``leaf`` under a switch.

    ``leaf`` may list the numbers of nodes under each switch; 0 puts all under one. ``gpu_type`` is the GRES
    type, the pool's name by default and none where it is empty; ``memory`` is MB.
    """

    name: str
    count: int
    gpu_type: str | None = None
    gpus: int = 8
    cpus: int = 192
    memory: int = 2_000_000
    features: str = ""
    leaf: int | tuple[int, ...] = 0
    max_time: str = "7-00:00:00"

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes."""
        return tuple(f"{self.name}-{number}" for number in range(1, self.count + 1))

    @property
    def leaves(self) -> tuple[tuple[str, ...], ...]:
        """Names of the nodes under each leaf switch."""
        if isinstance(self.leaf, int):
            each = self.leaf or self.count
            return tuple(self.nodes[at : at + each] for at in range(0, self.count, each))
        ends = [sum(self.leaf[: at + 1]) for at in range(len(self.leaf))]
        assert ends[-1] == self.count, "the leaves hold all nodes"
        return tuple(self.nodes[end - size : end] for end, size in zip(ends, self.leaf, strict=True))

    @property
    def gres(self) -> str:
        """As in ``gpu:h100:8``."""
        kind = self.name if self.gpu_type is None else self.gpu_type
        return f"gpu:{kind}:{self.gpus}" if kind else f"gpu:{self.gpus}"


class SlurmCluster:
    """A controller (and slurmds, if ``running``) in a folder, started on entering and ended on leaving.

    ``topology`` is ``tree``, with a spine above the pools' leaves, or ``block``, whose blocks the leaves are
    (Slurm 23.11 and later). ``more`` are further lines of slurm.conf.
    """

    def __init__(
        self,
        folder: Path,
        pools: Sequence[Pool],
        *,
        running: bool = False,
        topology: str = "tree",
        more: Sequence[str] = (),
    ) -> None:
        self.folder, self.pools, self.running = folder, tuple(pools), running
        self.topology, self.more = topology, tuple(more)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> SlurmCluster:
        missing = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
        if missing:
            pytest.skip(f"no {missing[0]} here: apt-get install slurm-wlm")
        if self.running and os.geteuid():
            pytest.skip("slurmd starts jobs as root only")
        try:
            self._configure()
            self._start("slurmctld", "-D", "-c")
            self._await(lambda: "is UP" in self.run("scontrol", "ping", check=False).stdout, "slurmctld")
            for node in [node for pool in self.pools for node in pool.nodes] if self.running else ():
                self._start("slurmd", "-D", "-N", node)
            if self.running:
                self._await(lambda: set(self.states().values()) == {"idle"}, "slurmd")
        except (OSError, RuntimeError) as error:  # no devices or control groups in a container, perhaps
            self._end()
            pytest.skip(f"Slurm does not run here: {error}")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.running:
            self.run("scancel", "--user", getpass.getuser(), check=False)
            with suppress(RuntimeError):  # a job's processes end before the daemon that minds them
                self._await(
                    lambda: not self.run("squeue", "-h", check=False).stdout.strip(), "the end of jobs"
                )
        self._end()

    def run(
        self,
        *command: str,
        check: bool = True,
        cwd: Path | None = None,
        given: str | None = None,
        **env: str,
    ) -> subprocess.CompletedProcess[str]:
        """A command of Slurm's against this cluster; ``given`` is its standard input."""
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=check,
            timeout=60,
            input=given,
            cwd=cwd or self.folder,
            env=self.env | env,
        )

    def states(self) -> dict[str, str]:
        """The state of every node in Slurm's words, without what is appended to it, as in ``idle~``."""
        shown = self.run("sinfo", "-N", "-h", "-o", "%N %T", check=False).stdout
        pairs = [line.split() for line in shown.splitlines()]
        return {name: state.rstrip("*~#%$@!-+") for name, state in pairs}

    def occupy(self, nodes: str, gpus: int | None = None, time: str = "4:00:00") -> int:
        """Gives whole nodes, or some of the GPUs of each, to a job that stays; its number.

        ``nodes`` is a list as Slurm writes it, ``h100-[1-3]``.
        """
        count = len(self.run("scontrol", "show", "hostnames", nodes).stdout.split())
        pool = next(pool for pool in self.pools if nodes.startswith(f"{pool.name}-"))
        part = ["--exclusive"] if gpus is None else ["--cpus-per-task=1", "--mem=1000"]
        done = self.run(
            "sbatch",
            "--parsable",
            f"--partition={pool.name}",
            f"--nodes={count}",
            "--ntasks-per-node=1",
            f"--nodelist={nodes}",
            f"--gpus-per-node={pool.gpus if gpus is None else gpus}",
            f"--time={time}",
            *part,
            "--wrap=sleep 100000",
        )
        job = int(done.stdout.split(";")[0])
        self._await(lambda: self.job(job)["JobState"] in ("RUNNING", "CONFIGURING"), f"job {job}")
        return job

    def drain(self, nodes: str, reason: str = "maintenance") -> None:
        """Takes nodes out; jobs that they have go on."""
        self._update(nodes, "DRAIN", reason)

    def down(self, nodes: str, reason: str = "no answer") -> None:
        """Makes nodes count as broken."""
        self._update(nodes, "DOWN", reason)

    def resume(self, nodes: str) -> None:
        """Puts drained or broken nodes back."""
        self._update(nodes, "RESUME", "none")

    def _update(self, nodes: str, state: str, reason: str) -> None:
        self.run("scontrol", "update", f"NodeName={nodes}", f"State={state}", f"Reason={reason}")

    def job(self, number: int) -> dict[str, str]:
        """What the controller says of a job, by name."""
        shown = self.run("scontrol", "--oneliner", "show", "job", str(number)).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def wait(self, number: int, seconds: float = 120) -> dict[str, str]:
        """Waits until a job has ended; what is said of it then."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")
        self._await(lambda: self.job(number)["JobState"] in ended, f"job {number}", seconds)
        return self.job(number)

    def fits(self, *options: str, script: str = "#!/bin/sh\n") -> subprocess.CompletedProcess[str]:
        """``sbatch --test-only``: when and where would such a job start? Status 0 where it ever could."""
        return self.run("sbatch", "--test-only", *options, given=script, check=False)

    @staticmethod
    def installed() -> tuple[int, int]:
        """The version of Slurm that there is, as in (22, 5); the test is left out without one."""
        if not (found := shutil.which("slurmctld", path=PATH)):
            pytest.skip("no slurmctld here: apt-get install slurm-wlm")
        said = subprocess.run([found, "-V"], capture_output=True, text=True, check=True).stdout
        year, month = said.split()[1].split(".")[:2]
        return int(year), int(month)

    def _await(self, holds: Callable[[], object], what: str, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > end:
                logs = "".join(path.read_text()[-2000:] for path in sorted(self.folder.glob("*.log")))
                raise RuntimeError(f"{what} is not there after {seconds:g} seconds\n{logs}")
            time.sleep(0.05)

    def _start(self, program: str, *options: str) -> None:
        with (self.folder / f"{program}.out.log").open("ab") as log:
            self.processes.append(
                subprocess.Popen(
                    [str(shutil.which(program, path=PATH)), *options, "-f", self.env["SLURM_CONF"]],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self.env,
                    start_new_session=True,
                )
            )

    def _end(self) -> None:
        for process in reversed(self.processes):
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in reversed(self.processes):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()

    def _configure(self) -> None:
        for name in ("state", "spool", "run", "dev"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for pool in self.pools if self.running else ():
            for node in pool.nodes:
                (self.folder / "spool" / node).mkdir(exist_ok=True)
            for number in range(pool.gpus):
                place = self.folder / "dev" / f"nvidia{number}"
                with suppress(FileExistsError):  # of NVIDIA's major number; nobody opens them
                    os.mknod(place, stat.S_IFCHR | 0o600, os.makedev(195, number))
        (self.folder / "slurm.conf").write_text("".join(f"{line}\n" for line in self._conf()))
        able = self.running and self.installed() >= (23, 11)  # to do without control groups
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n" if able else "")
        (self.folder / "gres.conf").write_text("".join(f"{line}\n" for line in self._gres()))
        (self.folder / "topology.conf").write_text("".join(f"{line}\n" for line in self._topology()))

    def _conf(self) -> list[str]:
        user, place = getpass.getuser(), self.folder
        ports = free_ports(1 + sum(pool.count for pool in self.pools) * self.running)
        lines = [
            "ClusterName=loopback",
            "SlurmctldHost=localhost(127.0.0.1)",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            "AuthType=auth/none",
            "CredType=cred/none",
            f"SlurmctldPort={ports[0]}",
            f"StateSaveLocation={place}/state",
            f"SlurmdSpoolDir={place}/spool/%n",
            f"SlurmctldPidFile={place}/run/slurmctld.pid",
            f"SlurmdPidFile={place}/run/slurmd-%n.pid",
            f"SlurmctldLogFile={place}/slurmctld.log",
            f"SlurmdLogFile={place}/slurmd-%n.log",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "MpiDefault=none",
            "ReturnToService=2",
            "SlurmdParameters=config_overrides",  # the books hold, not what this machine has
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core_Memory",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0,"
            "max_switch_wait=86400",  # five minutes else, whatever a job asks for
            "EnforcePartLimits=ALL",  # else a time that is too long is accepted
            "GresTypes=gpu",
            "AccountingStorageType=accounting_storage/none",
            "JobAcctGatherType=jobacct_gather/none",
            f"TopologyPlugin=topology/{self.topology}",
            *self.more,
        ]
        if not self.running:
            lines += [
                "PrivateData=cloud",  # else nodes that are powered down are not shown
                "SuspendProgram=/bin/true",
                "ResumeProgram=/bin/true",
                "SuspendTime=86400",
                "ResumeTimeout=3600",
            ]
        first = 1
        for number, pool in enumerate(self.pools):
            if self.running:
                at = ports[first : first + pool.count]
                first += pool.count
            else:
                at = [20000 + 1000 * number + one for one in range(pool.count)]  # nobody listens there
            feature = f" Feature={pool.features}" if pool.features else ""
            state = "UNKNOWN" if self.running else "CLOUD"
            lines += [
                f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={pool.cpus} "
                f"RealMemory={pool.memory} Gres={pool.gres} State={state}{feature}"
                for node, port in zip(pool.nodes, at, strict=True)
            ]
            default = " Default=YES" if number == 0 else ""
            lines.append(
                f"PartitionName={pool.name} Nodes={','.join(pool.nodes)}{default} "
                f"MaxTime={pool.max_time} State=UP"
            )
        return lines

    def _gres(self) -> list[str]:
        lines = []
        for pool in self.pools:
            kind = pool.gres.split(":")[1:-1]
            typed = f" Type={kind[0]}" if kind else ""
            held = (
                f"File={self.folder}/dev/nvidia[0-{pool.gpus - 1}]" if self.running else f"Count={pool.gpus}"
            )
            lines.append(f"NodeName={','.join(pool.nodes)} Name=gpu{typed} {held}")
        return lines

    def _topology(self) -> list[str]:
        leaves = [leaf for pool in self.pools for leaf in pool.leaves]
        if self.topology == "block":
            size = min(map(len, leaves))
            blocks = [f"BlockName=block{n} Nodes={','.join(leaf)}" for n, leaf in enumerate(leaves, 1)]
            return [*blocks, f"BlockSizes={size}"]
        switches = [f"SwitchName=leaf{n} Nodes={','.join(leaf)}" for n, leaf in enumerate(leaves, 1)]
        return [*switches, f"SwitchName=spine Switches=leaf[1-{len(leaves)}]"]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    held = [socket.socket() for _ in range(count)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()
