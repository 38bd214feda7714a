"""A long run on paper: `sambalm slurm estimate` reprints the numbers of docs/scaling.md, which explains them."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from rich.console import Console
from rich.table import Table

from sambalm.model.parameters import count_parameters
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.planner.hardware import H100
from sambalm.pretrain.planner.search import DAY_S, GIB, Plan, find_plans
from sambalm.pretrain.planner.sizes import FP32_BYTES

HOUR_S = 3600.0
STATE_TENSORS = 3  # a weight and two moments
SIMULATED_RUNS, SIMULATION_SEED = 200, 0


@dataclass(frozen=True)
class Cluster:
    """What is assumed of a cluster beside its GPUs; docs/scaling.md says where each number comes from."""

    gpu_memory_gib: float = 80.0
    # Llama 3 405B: 419 unexpected interruptions in 54 days on 16,384 GPUs.
    gpu_hours_per_failure: float = 16_384 * 54 * 24 / 419
    node_disk_bytes_per_s: float = 2e9  # of one node to the shared file system, each way
    disk_bytes_per_s: float = 100e9  # of the file system in all
    copy_bytes_per_s: float = 25e9  # from a device to the host's memory: PCI Express 5, half of what it can
    detection_s: float = 30.0  # from a failure to the end of the last rank
    health_check_s: float = 60.0
    start_s: float = 120.0  # imports, process groups, the first step's compilations
    time_limit_s: float = 48 * HOUR_S
    requeue_s: float = 180.0  # Slurm holds a requeued job 120 s by default; then it starts, if its nodes are free


@dataclass(frozen=True)
class Estimate:
    """A run on so many nodes."""

    nodes: int
    plan: Plan
    cluster: Cluster
    parameters: int

    @property
    def step_s(self) -> float:
        return self.plan.time.total_s

    @property
    def training_s(self) -> float:
        """Seconds in steps whose work is kept."""
        return self.plan.config.train.steps * self.step_s

    @property
    def checkpoint_bytes(self) -> float:
        return STATE_TENSORS * FP32_BYTES * self.parameters

    @property
    def stall_s(self) -> float:
        """What a save holds training up for: each rank copies its share to the host."""
        return self.checkpoint_bytes / self.plan.world_size / self.cluster.copy_bytes_per_s

    @property
    def write_s(self) -> float:
        """All nodes write their shares, beside the steps that follow."""
        return self.checkpoint_bytes / self._disk_bytes_per_s

    @property
    def load_s(self) -> float:
        """The main rank checks every checksum; then all read each byte once, and weights go to every replica."""
        check_s = self.checkpoint_bytes / self.cluster.node_disk_bytes_per_s
        sent_s = FP32_BYTES * self.parameters / H100.network_bytes_per_s
        return check_s + self.checkpoint_bytes / self._disk_bytes_per_s + sent_s

    @property
    def _disk_bytes_per_s(self) -> float:
        return min(self.nodes * self.cluster.node_disk_bytes_per_s, self.cluster.disk_bytes_per_s)

    @property
    def restart_s(self) -> float:
        """From a failure to the first step after it, within the job."""
        cluster = self.cluster
        return cluster.detection_s + cluster.health_check_s + cluster.start_s + self.load_s

    @property
    def failure_interval_s(self) -> float:
        return self.cluster.gpu_hours_per_failure * HOUR_S / self.plan.world_size

    @property
    def save_interval_s(self) -> float:
        return self.plan.config.checkpoint.every_steps * self.step_s

    @property
    def best_save_steps(self) -> int:
        """Young's interval, where saves cost as much as the steps that failures lose; no save meets the one before."""
        interval_s = max(math.sqrt(2 * self.stall_s * self.failure_interval_s), self.write_s)
        return max(1, math.ceil(interval_s / self.step_s))

    @property
    def goodput(self) -> float:
        """Share of the time that is spent in steps that count."""
        saves = self.stall_s / self.save_interval_s
        failures = (self.save_interval_s / 2 + self.write_s + self.restart_s) / self.failure_interval_s
        limits = (self.stall_s + self.write_s + self.cluster.requeue_s + self.restart_s) / self.cluster.time_limit_s
        return (1 - failures - limits) / (1 + saves)

    @property
    def failures(self) -> float:
        """Expected over the run."""
        return self.training_s / self.goodput / self.failure_interval_s

    def simulated_goodput(self) -> float:
        """The same from runs with failures at random."""
        generator = random.Random(SIMULATION_SEED)
        return mean(self.training_s / self._simulate(generator) for _ in range(SIMULATED_RUNS))

    def _simulate(self, generator: random.Random) -> float:
        """Seconds of one run: stretches of training that end in a save, cut by failures and time limits.

        A save is of use once it is written. A run that leaves waits for it.
        """
        now_s, left_s = 0.0, self.training_s
        saved_left_s, written_s = left_s, 0.0  # what the newest checkpoint leaves to do, and when it is written
        older_left_s = left_s  # and the one before
        failure_s, limit_s = generator.expovariate(1 / self.failure_interval_s), self.cluster.time_limit_s
        while left_s > 0:
            stretch_s = min(self.save_interval_s, left_s)
            end_s = max(now_s + stretch_s, written_s) + self.stall_s
            if failure_s < min(end_s, limit_s):
                left_s = saved_left_s if written_s <= failure_s else older_left_s
                now_s = failure_s + self.restart_s
            elif limit_s < end_s:  # told in time, it saves what it has
                left_s -= min(stretch_s, max(0.0, limit_s - self.stall_s - self.write_s - now_s))
                now_s = max(now_s, limit_s) + self.cluster.requeue_s + self.restart_s
                limit_s = now_s + self.cluster.time_limit_s
            else:
                now_s, left_s = end_s, left_s - stretch_s
                older_left_s, saved_left_s, written_s = saved_left_s, left_s, now_s + self.write_s
                continue
            older_left_s, saved_left_s, written_s = left_s, left_s, now_s
            failure_s = now_s + generator.expovariate(1 / self.failure_interval_s)
        return now_s + self.write_s


def estimate(config: RunConfig, *, nodes: int, cluster: Cluster) -> Estimate:
    """The estimate of the layout that `sambalm plan` ranks first. Raises ConfigError when none fits."""
    if config.data.phases is not None:
        raise ConfigError(
            "`sambalm slurm estimate` reckons with one step for the whole run, and data.phases has several kinds: ask "
            "`sambalm plan`, or set data.phases=null and train.steps"
        )
    world_size = nodes * H100.node_gpus
    stage = config.parallel.zero_stage
    (plan,) = find_plans(
        config, world_size=world_size, memory_gib=cluster.gpu_memory_gib, hardware=H100, top=1, zero_stage=stage
    )
    parameters = count_parameters(config.model)["total"]
    return Estimate(nodes=nodes, plan=plan, cluster=cluster, parameters=parameters)


def print_estimates(estimates: Sequence[Estimate]) -> None:
    """A row for each quantity and a column for each number of nodes."""
    table = Table(title="nodes of 8 H100", title_justify="left")
    table.add_column("", no_wrap=True)
    for one in estimates:
        table.add_column(f"{one.nodes:,}", justify="right", no_wrap=True)
    rows = [_cells(one) for one in estimates]
    for name in rows[0]:
        table.add_row(name, *(cells[name] for cells in rows))
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)


def _cells(one: Estimate) -> dict[str, str]:
    plan, config = one.plan, one.plan.config
    days = one.training_s / one.goodput / DAY_S
    return {
        "layout": plan.layout,
        "data-parallel ranks": f"{plan.world_size // config.parallel.model_ranks:,}",
        "micro-batches x size": f"{plan.micro_batches} x {config.train.micro_batch_size}",
        "memory of the fullest rank (GiB)": f"{plan.memory.total_bytes / GIB:.1f}",
        "sent by a rank in a step (GB)": f"{plan.wire_bytes / 1e9:.1f}",
        "step (s)": f"{one.step_s:.2f}",
        "tokens/s": f"{config.train.global_batch_tokens / one.step_s:,.0f}",
        "checkpoint (GB)": f"{one.checkpoint_bytes / 1e9:.1f}",
        "stall of a save (s)": f"{one.stall_s:.3f}",
        "written after (s)": f"{one.write_s:.1f}",
        "load (s)": f"{one.load_s:.0f}",
        "restart after a failure (s)": f"{one.restart_s:.0f}",
        "hours between failures": f"{one.failure_interval_s / HOUR_S:.1f}",
        "failures in the run": f"{one.failures:.1f}",
        "steps between saves, config": f"{config.checkpoint.every_steps:,}",
        "steps between saves, best": f"{one.best_save_steps:,}",
        "goodput by formula": f"{one.goodput:.2%}",
        "goodput simulated": f"{one.simulated_goodput():.2%}",
        f"days for {config.run_tokens / 1e9:,.0f}B tokens": f"{days:.1f}",
    }
