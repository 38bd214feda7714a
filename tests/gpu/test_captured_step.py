"""Steps from CUDA graphs against the same steps launched kernel by kernel."""

import os
import socket
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from sambalm.model.registry import weight_copies
from sambalm.parallel.cuda_graphs import UNCAPTURED_STEPS
from sambalm.parallel.errors import ParallelError
from sambalm.parallel.groups import start_world
from sambalm.parallel.micro_batch import MicroBatch
from sambalm.parallel.zero.engine import whole_parameter
from sambalm.pretrain.config_file import load_config
from sambalm.pretrain.training import build_training

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"
# Kernels that repeat bit by bit.
SETTINGS = [
    *("run.dir=unused", "data.train=unused", "parallel={}", "train.micro_batch_size=2", "train.precision=bf16"),
    *("kernels.scan=cuda", "kernels.conv=cuda", "kernels.attention=flex", "model.hidden_size=256"),
]
MICRO_BATCHES = (1, 2, 1, 3, 1, 2, 3, 1, 1, 3, 2)  # of each step


def batches_of(config, count, *, world, length):
    tokens = torch.randint(config.model.vocab_size, (count, 2, length + 1))
    starts = [starts_of(length) if config.data.reset_at_document else None for _ in tokens]
    batches = zip(tokens, starts, strict=True)
    return [MicroBatch(batch[:, :-1], batch[:, 1:], start).on_rank(world) for batch, start in batches]


def starts_of(length):
    """Few documents in one row and many in the other, of other lengths at each call."""
    begins = torch.rand(2, length) < torch.tensor([[0.005], [0.2]])
    return (torch.arange(length) * begins).cummax(1).values


@contextmanager
def host_never_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:  # a step that waits fails its own test alone
        torch.cuda.set_sync_debug_mode("default")


def steps(config, world, micro_batches, *, graphs):
    """Losses, held-out losses between steps, and the weights at the end."""
    config = config.model_copy(update={"train": config.train.model_copy(update={"cuda_graphs": graphs})})
    training = build_training(config, world=world, checkpoint=None, bucket_elements=1)  # a bucket for each layer
    pipelined = world.pipeline.size > 1
    captured = training.executor.graphs.captured if graphs and not pipelined else {}
    reduces = training.executor.gradients is not None  # in a step's last micro-batch, which has a graph of its own
    expected = set()
    torch.manual_seed(world.data_rank)
    losses, held_out = [], []
    with closing(training.executor):  # graphs that hold messages must be gone before their process groups
        for step, count in enumerate(micro_batches, start=1):
            batches = batches_of(config, count, world=world, length=256)
            with host_never_waiting() if graphs and step > UNCAPTURED_STEPS else nullcontext():
                loss = training.executor.train_step(batches)
            losses.append(loss.item())
            if graphs and pipelined:
                chunks = [chunk.captured for chunk in training.executor.schedule.chunks]
                assert all(chunk and chunk.slots for chunk in chunks) == (step > UNCAPTURED_STEPS)
            elif graphs and step > UNCAPTURED_STEPS:
                expected |= {(number == 1, reduces and number == count) for number in range(1, count + 1)}
                assert set(captured) == expected
            if step % 4 == 0:
                batches = batches_of(config, 2, world=world, length=512)
                held_out.append(training.executor.losses(batches)[1].mean().item())
                assert not captured  # their memory is free meanwhile
                assert not (pipelined and training.executor.schedule.chunks[0].captured)
                expected.clear()
    weights = [whole_parameter(parameter).clone() for chunk in training.chunks for parameter in chunk.parameters()]
    return losses, held_out, weights


def compare_steps(parallel, *settings, micro_batches=MICRO_BATCHES):
    layout = (f"parallel.{key}={value}" for key, value in parallel.items())
    config = load_config(CONFIG, [*SETTINGS, *layout, *settings])
    copies = weight_copies(config.model, tensor_ranks=config.parallel.tensor)
    with start_world(config.parallel, copies=copies) as world:
        losses, held_out, weights = steps(config, world, micro_batches, graphs=True)
        expected = steps(config, world, micro_batches, graphs=False)
    assert len(set(losses)) == len(micro_batches)
    assert losses == expected[0]
    assert held_out == expected[1]
    assert all(torch.equal(here, there) for here, there in zip(weights, expected[2], strict=True))


def compare_on_rank(rank, ranks, parallel, port, settings, micro_batches):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port)
    compare_steps(parallel, *settings, micro_batches=micro_batches)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_graphs_take_the_steps_that_kernels_take(recompute):
    compare_steps({"recompute": recompute})


def test_graphs_take_other_documents_at_each_launch():
    compare_steps({}, "data.reset_at_document=true")


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs a CUDA device with FP8"
)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_graphs_round_weights_anew_in_each_step(recompute):
    compare_steps({"recompute": recompute}, "train.matmul_precision=fp8")


def test_documents_whose_lengths_a_kernel_reads_on_the_host_are_launched_kernel_by_kernel():
    config = load_config(CONFIG, [*SETTINGS, "data.reset_at_document=true", "kernels.attention=torch-flash"])
    with start_world(config.parallel) as world:
        training = build_training(config, world=world, checkpoint=None)
        for _ in range(UNCAPTURED_STEPS + 1):
            training.executor.train_step(batches_of(config, 1, world=world, length=256))
        assert not training.executor.graphs.captured


def test_graphs_of_an_interleaved_pipeline_take_the_steps_that_kernels_take():
    """Its schedule takes micro-batches in rounds of the stages."""
    on_gpus(2, {"pipeline": 2, "virtual_pipeline": 2}, (), (2, 4, 2, 4, 6, 2, 4, 4))


@pytest.mark.parametrize("settings", [(), ("data.reset_at_document=true",)], ids=["stream", "packed"])
@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, {"zero_stage": 1}),
        (2, {"zero_stage": 2}),
        (2, {"zero_stage": 3}),
        (2, {"zero_stage": 3, "recompute": "full"}),
        (2, {"pipeline": 2}),
        (2, {"pipeline": 2, "recompute": "full"}),
        (2, {"tensor": 2}),
        (2, {"tensor": 2, "sequence": "true"}),
        (2, {"tensor": 2, "sequence": "true", "recompute": "full"}),
        (2, {"context": 2}),
        (2, {"context": 2, "recompute": "selective"}),
        (4, {"tensor": 2, "sequence": "true", "zero_stage": 1}),
        (4, {"pipeline": 2, "zero_stage": 1}),
    ],
    ids=str,
)
def test_graphs_of_several_gpus_take_the_steps_that_kernels_take(ranks, parallel, settings):
    on_gpus(ranks, parallel, settings, MICRO_BATCHES)


def on_gpus(ranks, parallel, settings, micro_batches):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    torch.multiprocessing.spawn(compare_on_rank, (ranks, parallel, port, settings, micro_batches), nprocs=ranks)


def refuse_on_rank(rank):
    config = load_config(CONFIG, SETTINGS)
    with start_world(config.parallel) as world:
        training = build_training(config, world=world, checkpoint=None)
        model = training.chunks[0]

        def wait_for_the_device(*_):
            next(model.parameters()).sum().item()

        model.register_forward_hook(wait_for_the_device)
        for _ in range(UNCAPTURED_STEPS):
            training.executor.train_step(batches_of(config, 1, world=world, length=256))
        with pytest.raises(ParallelError, match=r"captured as a CUDA graph .* train.cuda_graphs=false"):
            training.executor.train_step(batches_of(config, 1, world=world, length=256))


def test_what_cannot_be_captured_is_said_in_a_sentence():
    torch.multiprocessing.spawn(refuse_on_rank)  # a process that has failed to capture draws no more random numbers
