"""Layouts that cannot work are refused in one sentence that says what to change, before any process group exists."""

import pytest
import torch.distributed as dist

from sambalm.parallel.errors import ParallelError
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.trainer import train
from tests.support.whole_runs import changed

# Name: processes, changed sections, what the sentence must say; the processes and changes that make it work.
REFUSED = {
    "processes do not fill whole copies": (
        6,
        {"parallel": {"tensor": 2, "pipeline": 2}},
        "6 processes.*multiple of 4",
        (4, {}),
    ),
    "fewer processes than one copy": (2, {"parallel": {"context": 4}}, "2 processes.*multiple of 4", (4, {})),
    "ranks that kv heads cannot be dealt to": (
        3,
        {"model": {"vocab_size": 384}, "parallel": {"tensor": 3}},
        "parallel.tensor is 3: 4 query heads with 2 kv heads.*choose at most 2, or a multiple of it up to 4",
        (2, {"parallel": {"tensor": 2}}),
    ),
    "more ranks than query heads": (
        8,
        {"parallel": {"tensor": 8}},
        "parallel.tensor is 8: 4 query heads with 2 kv heads.*choose at most 2, or a multiple of it up to 4",
        (4, {"parallel": {"tensor": 4}}),
    ),
    "vocabulary": (
        2,
        {"model": {"vocab_size": 1}, "parallel": {"tensor": 2}},
        "model.vocab_size is 1, too few for each of parallel.tensor 2 ranks.*lower parallel.tensor",
        (2, {"model": {"vocab_size": 385}}),
    ),
    "MLP narrower than its ranks": (
        4,
        {"model": {"mlp_size": 3}, "parallel": {"tensor": 4}},
        "model.mlp_size is 3, less than parallel.tensor 4: lower parallel.tensor",
        (2, {"parallel": {"tensor": 2}}),
    ),
    "sequence over context": (
        3,
        {"parallel": {"context": 3}, "train": {"global_batch_tokens": 256}},
        "data.sequence_length is 32, which cannot be cut into 3 parts.*make it a multiple",
        (2, {"parallel": {"context": 2}}),
    ),
    "sequence over context and tensor": (
        4,
        {
            "parallel": {"context": 2, "tensor": 2, "sequence": True},
            "data": {"sequence_length": 34},
            "train": {"global_batch_tokens": 272},
        },
        "data.sequence_length is 34, which cannot be cut into 4 parts.*parallel.sequence",
        (4, {"parallel": {"sequence": False}}),
    ),
    "sequence parallelism without tensor parallelism": (
        1,
        {"parallel": {"sequence": True}},
        "parallel.sequence is true while parallel.tensor is 1",
        (1, {"parallel": {"tensor": 1, "sequence": False}}),
    ),
    "ZeRO-2 on a pipeline": (
        2,
        {"parallel": {"pipeline": 2, "zero_stage": 2}},
        "parallel.zero_stage is 2.*to 1",
        (2, {"parallel": {"zero_stage": 1}}),
    ),
    "ZeRO-3 on a pipeline": (
        2,
        {"parallel": {"pipeline": 2, "zero_stage": 3}},
        "parallel.zero_stage is 3.*to 1",
        (2, {"parallel": {"zero_stage": 1}}),
    ),
    "virtual pipeline alone": (
        1,
        {"parallel": {"virtual_pipeline": 2}},
        "parallel.virtual_pipeline is 2 while parallel.pipeline is 1",
        (1, {"parallel": {"virtual_pipeline": 1}}),
    ),
    "micro-batches in incomplete rounds": (
        2,
        {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "train": {"global_batch_tokens": 192}},
        "parallel.virtual_pipeline is 2.*rounds of parallel.pipeline 2.*3 on each rank.*multiple",
        (2, {"train": {"global_batch_tokens": 256}}),
    ),
    "micro-batches in whole rounds of another length": (
        4,
        {
            "model": {"pattern": "M-*-M-*-"},
            "parallel": {"pipeline": 4, "virtual_pipeline": 2},
            "train": {"global_batch_tokens": 384},
        },
        "parallel.virtual_pipeline is 2.*rounds of parallel.pipeline 4.*6 on each rank.*multiple",
        (4, {"train": {"global_batch_tokens": 512}}),
    ),
    "global batch over data-parallel ranks": (
        4,
        {"train": {"global_batch_tokens": 320}},
        "train.global_batch_tokens is 320.*4 data-parallel ranks = 256",
        (4, {"train": {"global_batch_tokens": 512}}),
    ),
    "more parts than sublayers": (
        4,
        {"parallel": {"pipeline": 4, "virtual_pipeline": 2}},
        "is 8, more than the 4 sublayers of model.pattern: lower",
        (4, {"parallel": {"virtual_pipeline": 1}}),
    ),
    "pipeline_layers of the wrong length": (
        2,
        {"parallel": {"pipeline": 2, "pipeline_layers": [1, 1, 2]}},
        r"parallel.pipeline_layers is \[1, 1, 2\]: it needs .* = 2 entries",
        (2, {"parallel": {"pipeline_layers": [1, 3]}}),
    ),
    "pipeline_layers of the wrong sum": (
        2,
        {"parallel": {"pipeline": 2, "pipeline_layers": [2, 3]}},
        r"parallel.pipeline_layers is \[2, 3\], 5 in all, and model.pattern has 4 sublayers",
        (2, {"parallel": {"pipeline_layers": [2, 2]}}),
    ),
    "an empty part": (
        2,
        {"parallel": {"pipeline": 2, "pipeline_layers": [4, 0]}},
        "parallel.pipeline_layers.* is 0: .*greater than 0",
        (2, {"parallel": {"pipeline_layers": [3, 1]}}),
    ),
}


class Reached(Exception):
    """The process group was asked for."""


@pytest.fixture
def train_in(monkeypatch):
    """Starts a run as one of so many processes, up to the process group."""

    def stop(*args, **kwargs):
        raise Reached

    def start(values, processes):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        train(parse_config(values, source="run.yaml"))

    monkeypatch.setattr(dist, "init_process_group", stop)
    return start


@pytest.mark.parametrize("name", REFUSED)
def test_a_layout_that_cannot_work_is_refused_and_the_way_out_works(name, run_values, train_in):
    processes, changes, sentence, (mended_processes, way_out) = REFUSED[name]
    values = changed(run_values, **changes)
    with pytest.raises((ConfigError, ParallelError), match=sentence) as refused:
        train_in(values, processes)
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 300
    with pytest.raises(Reached):
        train_in(changed(values, **way_out), mended_processes)


def test_heads_do_not_matter_without_attention(run_values, train_in):
    values = changed(
        run_values, model={"pattern": "M-", "num_query_heads": 1, "num_kv_heads": 1}, parallel={"tensor": 2}
    )
    with pytest.raises(Reached):
        train_in(values, 2)
