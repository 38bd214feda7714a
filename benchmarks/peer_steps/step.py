"""Times one model's training step at one sequence length on this machine; prints a line of JSON. peers.py runs it.

    python benchmarks/peer_steps/step.py configs/samba_421m.yaml --model plain --length 4096

Every model takes the same random tokens, which are on the device beforehand, in the same micro-batches forward and
backward, and one step of clipping and fused AdamW with the config's settings. Sizes are the config's, and so is the
precision of this project's models; that of the others is as below.

samba  This project's model and the DeepSpeed engine of `sambalm train`: fp32 weights.
llama  The same code and training with attention to all tokens before in place of Mamba and of window attention, and an
       MLP as wide as makes the number of parameters that of the Samba.
fla    flash-linear-attention's SambaForCausalLM, all of it in bf16: weights, gradients and AdamW's moments, which takes
       less memory than fp32. Its fused norms, SwiGLU and cross-entropy are on; the scan is mamba-ssm's. Needs
       flash-linear-attention, flash-attn, mamba-ssm and causal-conv1d.
plain  What a page of PyTorch makes of it: mamba_ssm.Mamba, the flash kernel inside PyTorch, norms, SwiGLU, rotary
       positions and loss fused by torch.compile; fp32 weights under bf16 autocast. Needs mamba-ssm and causal-conv1d.

--recompute full keeps the inputs of layers alone and computes the rest again in the backward: parallel.recompute here,
gradient_checkpointing_enable() in fla (by blocks of two layers), torch.utils.checkpoint in plain.
"""

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import peer_models
import torch
from peer_models import Unavailable
from torch import Tensor, nn

from sambalm.model.config import ModelConfig
from sambalm.model.ops.errors import KernelError
from sambalm.model.parameters import count_parameters
from sambalm.parallel.groups import World, start_world
from sambalm.parallel.micro_batch import MicroBatch
from sambalm.parallel.zero.engine import gradient_norm
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.config_file import load_config
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.launched_step import LaunchedStep, Moment, StepResult
from sambalm.pretrain.training import build_training

MLP_MULTIPLE = 128  # of the Llama's MLP width, for the sake of its matrix products
PACKAGES = ("deepspeed", "flash-linear-attention", "fla-core", "flash-attn", "mamba-ssm", "causal-conv1d")


@dataclass(frozen=True)
class Contestant:
    # Micro-batches, int64 [sequences, length + 1], to their mean loss and the gradient's norm before clipping, each []
    # on the device, which may still be at it.
    step: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]
    parameters: int
    kernels: tuple[str, ...] = ()  # the choices of this project's models


@dataclass(frozen=True)
class Measurement:
    """What a cell of peers.py's table is made of."""

    device: str
    torch: str
    packages: dict[str, str]  # versions of those that are installed
    kernels: tuple[str, ...]
    parameters: int
    step_times_s: list[float]  # of all steps
    tokens_per_s: float  # of the timed ones, by their median
    loss: float  # of the last step
    kept_bytes: int  # on the device between steps
    peak_bytes: int  # on the device within steps; 0 on a CPU
    device_bytes: int  # of the device's memory; 0 on a CPU


def settings_of(arguments: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    """The config of a run alone on this machine; overrides may still change the model, optimizer and kernels."""
    sequences = max(1, min(arguments.micro_batch_tokens, arguments.step_tokens) // arguments.length)
    values = {
        "run.dir": "unused",
        "data.train": "unused",
        "data.sequence_length": arguments.length,
        "train.global_batch_tokens": arguments.step_tokens,
        "train.micro_batch_size": sequences,
        "train.batch_ramp": "null",
        "parallel": "{recompute: " + arguments.recompute + "}",
    }
    return [*overrides, *(f"{key}={value}" for key, value in values.items())]


def llama_settings(model: ModelConfig, *, length: int) -> list[str]:
    """Settings that make a Samba's config a Llama's."""
    values = model.model_dump() | {"pattern": model.pattern.replace("M", "*"), "window": length}
    parameters = count_parameters(model)["total"]
    mlp_size = equal_mlp_size(values, parameters=parameters, multiple=MLP_MULTIPLE)
    return [f"model.pattern='{values['pattern']}'", f"model.window={length}", f"model.mlp_size={mlp_size}"]


def equal_mlp_size(values: Mapping[str, Any], *, parameters: int, multiple: int) -> int:
    """The width of the MLP, a multiple of a number, with which a model of these values has most nearly so many."""

    def parameters_at(mlp_size: int) -> int:
        return count_parameters(ModelConfig.model_validate({**values, "mlp_size": mlp_size}))["total"]

    base = parameters_at(multiple)
    return multiple * max(1, 1 + round((parameters - base) / max(1, parameters_at(2 * multiple) - base)))


@contextlib.contextmanager
def own(config: RunConfig) -> Iterator[Contestant]:
    """A step as `sambalm train` takes it, in a process of its own."""
    with start_world(config.parallel) as world, trained_in(world, config) as ready:
        yield ready


@contextlib.contextmanager
def trained_in(world: World, config: RunConfig) -> Iterator[Contestant]:
    """A step as `sambalm train` takes it. What it holds of the device is free again on leaving."""
    training = build_training(config, world=world, checkpoint=None)

    def step(batches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        micro_batches = [MicroBatch(batch[:, :-1], batch[:, 1:]) for batch in batches]
        loss = training.executor.train_step(micro_batches)
        return loss, gradient_norm(training.engine)

    try:
        yield Contestant(step, count_parameters(config.model)["total"], training.kernels.names)
    finally:
        training.executor.release()


def peer(model: nn.Module, loss_of: peer_models.LossOf, config: RunConfig) -> Contestant:
    """A step of a model of another origin."""
    settings = config.optimizer
    by_decay: dict[float, list[nn.Parameter]] = {settings.weight_decay: [], 0.0: []}
    for name, parameter in model.named_parameters():
        decays = parameter.dim() > 1 and not name.endswith(".A_log")
        by_decay[settings.weight_decay if decays else 0.0].append(parameter)
    groups = [{"params": parameters, "weight_decay": decay} for decay, parameters in by_decay.items()]
    betas = settings.beta1, settings.beta2
    optimizer = torch.optim.AdamW(groups, lr=settings.peak_lr, betas=betas, eps=settings.eps, fused=True)

    def step(batches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        losses = []
        for batch in batches:
            loss = loss_of(batch) / len(batches)
            loss.backward()
            losses.append(loss.detach())
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).sum(), norm

    return Contestant(step, sum(parameter.numel() for parameter in model.parameters()))


def contestant(
    arguments: argparse.Namespace, overrides: Sequence[str]
) -> contextlib.AbstractContextManager[Contestant]:
    """The model that the arguments name, ready to train.

    Raises:
        ConfigError: of the config.
        Unavailable: the model cannot run on this machine.
    """
    path, settings = Path(arguments.config), settings_of(arguments, overrides)
    config = load_config(path, settings)
    config.check_world(1)
    if arguments.model == "samba":
        return own(config)
    if arguments.model == "llama":
        return own(load_config(path, [*settings, *llama_settings(config.model, length=arguments.length)]))
    make = {"fla": peer_models.fla_samba, "plain": peer_models.plain_samba}[arguments.model]
    model, loss_of = make(config.model, recompute=arguments.recompute == "full")
    return contextlib.nullcontext(peer(model, loss_of, config))


def measure(contestant: Contestant, arguments: argparse.Namespace, *, vocab_size: int) -> Measurement:
    """Times steps: as many as the arguments say, or fewer of long ones, but two, of which the first does not count.

    From the third one on, the host reads a step's results once it has launched the next, as `sambalm train` does.
    """
    on_gpu = torch.cuda.is_available()
    shape = (arguments.step_tokens // arguments.length, arguments.length + 1)
    generator = torch.Generator().manual_seed(0)
    steps = arguments.warmup + arguments.steps
    tokens = [torch.randint(vocab_size, shape, generator=generator) for _ in range(steps)]
    tokens = [each.to("cuda" if on_gpu else "cpu") for each in tokens]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    results: list[StepResult] = []
    device = tokens[0].device

    def launch(number: int) -> LaunchedStep:
        start = Moment.after_all(device)
        batches = tokens[number].split(max(1, arguments.micro_batch_tokens // arguments.length))
        loss, norm = contestant.step(batches)
        size, lr = arguments.step_tokens, float("nan")
        return LaunchedStep.launch(
            number=number,
            tokens=size,
            batch_tokens=size,
            lr=lr,
            start=start,
            loss=loss,
            norm=norm,
            skipped=torch.zeros((), device=device),
            agreed=torch.zeros(1, device=device),
        )

    for number in range(2):
        results.append(launch(number).result())
    further = min(steps - 2, int(arguments.seconds / results[1].step_time_s))
    unread = None
    for number in range(2, 2 + further):
        launched = launch(number)
        if unread:
            results.append(unread.result())
        unread = launched
        if launched.is_finished:  # on a CPU
            results.append(launched.result())
            unread = None
    if unread:
        results.append(unread.result())
    times_s = [result.step_time_s for result in results]
    return Measurement(
        device=torch.cuda.get_device_name() if on_gpu else "CPU",
        torch=torch.__version__,
        packages=versions(),
        kernels=contestant.kernels,
        parameters=contestant.parameters,
        step_times_s=times_s,
        tokens_per_s=arguments.step_tokens / statistics.median(times_s[1:][-arguments.steps :]),
        loss=results[-1].loss,
        kept_bytes=torch.cuda.memory_allocated() if on_gpu else 0,
        peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else 0,
        device_bytes=torch.cuda.get_device_properties(0).total_memory if on_gpu else 0,
    )


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def main() -> None:
    if sys.argv[1:] != ["--wait"]:
        run(sys.argv[1:])
    elif line := sys.stdin.readline():  # peers.py starts processes ahead, and says later what they run
        run(json.loads(line))


def run(command: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--model", choices=["samba", "llama", "fla", "plain"], required=True)
    parser.add_argument("--length", type=int, required=True, help="tokens of a sequence")
    parser.add_argument("--step-tokens", type=int, default=65536, help="of one optimizer step; a multiple of --length")
    parser.add_argument("--micro-batch-tokens", type=int, default=32768, help="of one forward and backward, at least")
    parser.add_argument("--recompute", choices=["none", "full"], default="none")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=4, help="timed steps")
    parser.add_argument("--seconds", type=float, default=8.0, help="of steps after the second one, about and at most")
    arguments, overrides = parser.parse_known_intermixed_args(command)
    if min(arguments.warmup, arguments.steps) < 1:
        parser.error(f"--warmup is {arguments.warmup} and --steps {arguments.steps}: both are 1 at least")
    if arguments.step_tokens % arguments.length:
        parser.error(f"--step-tokens {arguments.step_tokens} is not a multiple of --length {arguments.length}")
    try:
        vocab_size = load_config(Path(arguments.config), settings_of(arguments, overrides)).model.vocab_size
        with contestant(arguments, overrides) as ready:
            outcome = {"outcome": "measured"} | asdict(measure(ready, arguments, vocab_size=vocab_size))
    except (ConfigError, KernelError) as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except Unavailable as error:
        outcome = {"outcome": "unavailable", "reason": str(error)}
    except torch.OutOfMemoryError:
        outcome = {"outcome": "out of memory"}
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
