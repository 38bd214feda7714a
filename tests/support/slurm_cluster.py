"""A throw-away cluster of real slurmctld, slurmd and munged on loopback, as root, without systemd.

    unshare --mount --pid --fork --kill-child --mount-proc python slurm_cluster.py FOLDER

Each node is a process namespace with a host name of its own, so that killing its first process is a loss of power. The
whole cluster is one too: it ends with this process, which ends with its standard input. Commands there: `kill NODE`,
`start NODE`. FOLDER/ready appears once every node is idle.
"""

import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

NODES, FAKE_NODES = ("n1", "n2", "n3"), 66
FOLDERS = ("etc", "log", "state", "munge", "run")
GPUS_OF_NODES = 2

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=10
KillWait=20
MinJobAge=600
JobRequeue=1
MessageTimeout=10
BatchStartTimeout=10
PropagateResourceLimits=NONE
GresTypes=gpu
PrivateData=cloud
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=86400
{nodes}
NodeName=f[001-{fake}] NodeAddr=127.0.0.1 Port={fake_port} CPUs=256 RealMemory=2000000 Gres=gpu:8 State=CLOUD
PartitionName=test Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes={names} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=fake Nodes=f[001-{fake}] MaxTime=INFINITE State=UP
"""


class Cluster:
    """Its files and daemons."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.daemons = folder, {}
        self.environment = os.environ | {"SLURM_CONF": str(folder / "etc/slurm.conf")}

    def write(self) -> None:
        folder, ports = self.folder, free_ports(len(NODES) + 2)
        for name in (*FOLDERS, *(f"spool/{node}" for node in NODES)):
            (folder / name).mkdir(parents=True, exist_ok=True)
        key = folder / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        (folder / "munge").chmod(0o755)
        lines = [
            f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={port} CPUs=16 RealMemory=128000 "
            f"Gres=gpu:{GPUS_OF_NODES} State=UNKNOWN"
            for node, port in zip(NODES, ports, strict=False)
        ]
        (folder / "etc/slurm.conf").write_text(
            CONFIG.format(
                host=socket.gethostname(),
                folder=folder,
                controller_port=ports[-1],
                fake_port=ports[-2],
                fake=f"{FAKE_NODES:03d}",
                nodes="\n".join(lines),
                names=",".join(NODES),
            )
        )
        devices = [folder / f"gpu{number}" for number in range(GPUS_OF_NODES)]
        for device in devices:  # slurmd insists on character devices
            os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        files = f"NodeName={','.join(NODES)} Name=gpu File={folder}/gpu[0-{GPUS_OF_NODES - 1}]"
        fake = f"NodeName=f[001-{FAKE_NODES:03d}] Name=gpu Count=8"
        (folder / "etc/gres.conf").write_text(f"AutoDetect=off\n{files}\n{fake}\n")
        (folder / "etc/cgroup.conf").write_text("CgroupPlugin=autodetect\nConstrainCores=no\n")
        names = "".join(f"127.0.0.1 {node}\n" for node in NODES)
        (folder / "etc/hosts").write_text(Path("/etc/hosts").read_text() + names)
        subprocess.run(["mount", "--bind", folder / "etc/hosts", "/etc/hosts"], check=True)

    def start(self) -> None:
        munge = self.folder / "munge"
        self.spawn(
            "munged",
            *("munged", "--foreground", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket"),
            *(f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"),
        )
        self.wait((munge / "socket").exists)
        self.spawn("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self.wait(self.all_idle)

    def start_node(self, node: str) -> None:
        namespaces = ("unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        self.spawn(node, *namespaces, "sh", "-c", f"hostname {node}; exec slurmd -D -N {node}")

    def kill_node(self, node: str) -> None:
        self.daemons[node].kill()
        self.daemons[node].wait()

    def spawn(self, name: str, *command: str) -> None:
        with (self.folder / f"log/{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd="/", env=self.environment
            )

    def wait(self, condition, timeout_s: float = 60) -> None:
        end_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end_s:
                raise TimeoutError(f"the cluster does not come up: see {self.folder}/log")
            time.sleep(0.1)

    def all_idle(self) -> bool:
        command = ["sinfo", "--noheader", "--Node", "--partition=test", "--format=%T"]
        shown = subprocess.run(command, capture_output=True, text=True, env=self.environment).stdout.split()
        return shown == ["idle"] * len(NODES)


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def main() -> None:
    cluster = Cluster(Path(sys.argv[1]).resolve())
    shutil.rmtree(cluster.folder, ignore_errors=True)
    cluster.write()
    cluster.start()
    (cluster.folder / "ready").touch()
    for line in sys.stdin:
        verb, node = line.split()
        {"kill": cluster.kill_node, "start": cluster.start_node}[verb](node)
    # The namespace ends with this process, and everything in it.


if __name__ == "__main__":
    main()
