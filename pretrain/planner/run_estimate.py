"""A long run on paper: `sambalm slurm estimate` reprints the numbers of docs/scaling.md, which explains them."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean

from rich.console import Console
from rich.table import Table

from sambalm.model.parameters import count_parameters
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.planner.hardware import H100, Hardware
from sambalm.pretrain.planner.search import DAY_S, GIB, Plan, find_plans
from sambalm.pretrain.planner.sizes import FP32_BYTES
from sambalm.pretrain.planner.table import describe_days, describe_tokens
from sambalm.pretrain.run_phases import RunPhase, RunSchedule, phase_line

HOUR_S = 3600.0
STATE_TENSORS = 3  # a weight and two moments
SIMULATED_RUNS, SIMULATION_SEED = 200, 0


@dataclass(frozen=True)
class Cluster:
    """What is assumed of a cluster; docs/scaling.md says where each number comes from."""

    hardware: Hardware = H100
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
    """A run, or a phase of one, on so many nodes."""

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
        sent_s = FP32_BYTES * self.parameters / self.cluster.hardware.network_bytes_per_s
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
    def days(self) -> float:
        """What the run takes, with all that costs it time."""
        return self.training_s / self.goodput / DAY_S

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


def estimate(config: RunConfig, *, nodes: int, cluster: Cluster) -> list[Estimate]:
    """Estimates each phase of a run, of the layout that `sambalm plan` ranks first for it; a run without is one phase.

    Raises:
        ConfigError: no layout fits.
    """
    schedule, parameters = config.schedule, count_parameters(config.model)["total"]
    plans: dict[str, Plan] = {}  # by what a step is: phases may differ in their data and tokens alone
    estimates = []
    for phase in schedule.phases:
        step = f"{phase.length} {_with_steps(phase.config, 0).train.model_dump_json()}"
        if step not in plans:
            plans[step] = _fastest(phase, schedule, nodes=nodes, cluster=cluster)
        plan = replace(plans[step], config=_with_steps(plans[step].config, phase.config.train.steps))
        estimates.append(Estimate(nodes=nodes, plan=plan, cluster=cluster, parameters=parameters))
    return estimates


def _with_steps(config: RunConfig, steps: int) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})


def _fastest(phase: RunPhase, schedule: RunSchedule, *, nodes: int, cluster: Cluster) -> Plan:
    try:
        (plan,) = find_plans(
            phase.config,
            world_size=nodes * cluster.hardware.node_gpus,
            memory_gib=cluster.gpu_memory_gib,
            hardware=cluster.hardware,
            top=1,
            zero_stage=phase.config.parallel.zero_stage,
        )
    except ConfigError as error:
        raise ConfigError(f"in {phase.key}, {error}" if schedule.is_phased else str(error)) from None
    return plan


def print_estimates(schedule: RunSchedule, estimates: Sequence[Sequence[Estimate]]) -> None:
    """A table for each phase, with a row for each quantity and a column for each number of nodes.

    Args:
        estimates: of each number of nodes, those of the phases.
    """
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    for phase, ones in zip(schedule.phases, zip(*estimates, strict=True), strict=True):
        if schedule.is_phased:
            console.print(phase_line(schedule, phase), highlight=False)
        hardware = ones[0].cluster.hardware
        table = Table(title=f"nodes of {hardware.node_gpus} {hardware.name.upper()}", title_justify="left")
        table.add_column("", no_wrap=True)
        for one in ones:
            table.add_column(f"{one.nodes:,}", justify="right", no_wrap=True)
        rows = [_cells(one, "phase" if schedule.is_phased else "run") for one in ones]
        for name in rows[0]:
            table.add_row(name, *(cells[name] for cells in rows))
        console.print(table)
    for phases in estimates if schedule.is_phased else ():
        print(f"{phases[0].nodes:,} nodes: {describe_days([(one.plan, one.days) for one in phases])}")


def _cells(one: Estimate, stretch: str) -> dict[str, str]:
    plan, config = one.plan, one.plan.config
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
        f"failures in the {stretch}": f"{one.failures:.1f}",
        "steps between saves, config": f"{config.checkpoint.every_steps:,}",
        "steps between saves, best": f"{one.best_save_steps:,}",
        "goodput by formula": f"{one.goodput:.2%}",
        "goodput simulated": f"{one.simulated_goodput():.2%}",
        f"days for {describe_tokens(config.run_tokens)} tokens": f"{one.days:.1f}",
    }
