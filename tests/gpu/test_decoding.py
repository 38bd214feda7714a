"""Generation on a GPU: kernels under the Hugging Face model and the graph of a step, against fp64 on a CPU."""

import copy

import pytest
import torch

from sambalm.model.hf import Stream
from sambalm.model.hf.generate import model_of_state
from tests.support.hf import VOCABULARY, RandomState, random_tokens, tiny_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = torch.device("cuda")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 1.5e-2}
SMALL = {"hidden_size": 64, "num_query_heads": 4, "num_kv_heads": 2, "mlp_size": 100, "window": 24}
ODD = {"hidden_size": 320, "num_query_heads": 5, "num_kv_heads": 1, "mlp_size": 1036, "window": 100, "d_state": 8}
WIDE = {"hidden_size": 1536, "num_query_heads": 12, "num_kv_heads": 12, "mlp_size": 4096, "window": 200}


def model_of(pattern: str = "M-*-", **sizes):
    """The model in fp64 on the CPU, whose weights fp16 and bf16 have too."""
    config = tiny_config(pattern, tie_embeddings=False, **sizes)
    model = model_of_state(RandomState(config, seed=2), config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if not name.endswith(("A_log", ".D", "dt_proj.bias")):
            parameter.data = parameter.data.to(torch.bfloat16).float().clamp(-1e4, 1e4)
    return model.double()


def on_gpu(model, dtype: torch.dtype):
    """A copy on the GPU in another dtype, but for what is always fp32."""
    there = copy.deepcopy(model).to(DEVICE)
    for name, parameter in there.named_parameters():
        is_fp32 = name.endswith(("A_log", ".D", "dt_proj.bias"))
        parameter.data = parameter.data.to(torch.float32 if is_fp32 else dtype)
    return there


def error(given: torch.Tensor, expected: torch.Tensor) -> float:
    return ((given.cpu().double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("sizes", "rows"), [(SMALL, 1), (SMALL, 70), (ODD, 3), (ODD, 17), (WIDE, 1), (WIDE, 17)])
def test_a_stream_reads_and_steps_as_in_fp64(rows, sizes, dtype):
    reference = model_of("M-*-", **sizes)
    there, here = Stream(on_gpu(reference, dtype), rows=rows), Stream(reference, rows=rows)
    # The window is full after the first few steps.
    prompt, more = random_tokens(rows, sizes["window"] - 5), random_tokens(rows, 12, seed=3)
    assert error(there.read(prompt), here.read(prompt)) < TOLERANCE[dtype]
    for ids in more.unbind(1):
        given, expected = there.step(ids.to(DEVICE)), here.step(ids)
        assert error(given, expected) < TOLERANCE[dtype]
    assert there._decoder, "the steps did not go through the graph"
    for name, tensor in there._tensors().items():
        assert error(tensor, here._tensors()[name]) < TOLERANCE[dtype], name
    assert error(there.read(prompt[:, :5]), here.read(prompt[:, :5])) < TOLERANCE[dtype]


@pytest.mark.parametrize("pattern", ["M", "*-", "M*", "M-M-*-"])
def test_patterns_step_from_the_first_token(pattern):
    reference = model_of(pattern, **SMALL)
    there, here = Stream(on_gpu(reference, torch.float32), rows=2), Stream(reference, rows=2)
    for ids in random_tokens(2, 30).unbind(1):
        assert error(there.step(ids), here.step(ids)) < 1e-4


@pytest.mark.parametrize(
    ("pattern", "options", "decodes"),
    [
        ("M*-", {"rope_base": None}, True),
        ("=-*-", {"mixers": {"mlp2": {"size": 72}}}, True),
        ("M-F-", {}, False),
        ("F*", {"rope_base": None}, False),
    ],
)
def test_baselines_step_from_the_first_token_by_the_graph_or_layer_by_layer(pattern, options, decodes):
    reference = model_of(pattern, **SMALL, **options)
    there, here = Stream(on_gpu(reference, torch.float32), rows=2), Stream(reference, rows=2)
    for ids in random_tokens(2, 30).unbind(1):
        assert error(there.step(ids), here.step(ids)) < 1e-4
    assert (there._decoder is not None) == decodes


def test_states_are_saved_copied_and_joined_between_steps(tmp_path):
    model = on_gpu(model_of(**SMALL), torch.bfloat16)
    streams = [Stream(model), Stream(model)]
    for stream, length in zip(streams, (5, 61), strict=True):
        stream.read(random_tokens(1, length, seed=length))
        stream.step(torch.tensor([3]))
        stream.save(tmp_path / f"{length}")
    loaded = Stream.load(model, tmp_path / "61")
    joined = Stream.join([streams[0], loaded, streams[1].fork([0])])
    assert joined.seen_tokens == [6, 62, 62]
    for ids in random_tokens(1, 20, seed=9)[0]:
        alone = [stream.step(ids[None]) for stream in streams]
        together = joined.step(ids.expand(3))
        assert torch.equal(together[1], together[2])
        for row, one in ((0, alone[0]), (1, alone[1])):
            assert error(together[row], one[0].cpu().double()) < 2e-2


def test_two_streams_give_the_same_bits():
    model, runs = on_gpu(model_of(**ODD), torch.bfloat16), []
    for _ in range(2):
        stream = Stream(model, rows=2)
        stream.read(random_tokens(2, 150))
        logits = stream.logits
        for _ in range(150):
            logits = stream.step(logits.argmax(-1))
        runs.append(logits)
    assert torch.equal(*runs)


def test_positions_of_a_billion_are_exact():
    reference = model_of("*-", **SMALL)
    there, here = Stream(on_gpu(reference, torch.float32)), Stream(reference)
    for stream in (there, here):
        stream.read(random_tokens(1, 30))
        state = stream._tensors()
        stream.__dict__.update(Stream._of(stream.model, state, seen_tokens=[999_999_000]).__dict__)
    for ids in random_tokens(1, 5, seed=4).unbind(1):
        assert error(there.step(ids), here.step(ids)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("sizes", "length"), [(SMALL, 1), (SMALL, 77), (SMALL, 1024), (ODD, 77), (ODD, 1024), (WIDE, 77)]
)
def test_a_forward_and_its_gradients_are_those_of_fp64(length, sizes, dtype):
    reference = model_of(**sizes)
    there, tokens = on_gpu(reference, dtype), random_tokens(2, length)
    expected = reference(tokens, labels=tokens if length > 1 else None, use_cache=False)
    given = there(tokens.to(DEVICE), labels=tokens.to(DEVICE) if length > 1 else None, use_cache=False)
    assert error(given.logits.detach(), expected.logits.detach()) < TOLERANCE[dtype]
    if length == 1:
        return
    expected.loss.backward()
    given.loss.backward()
    pairs = zip(there.named_parameters(), reference.parameters(), strict=True)
    worst = {name: error(one.grad, other.grad) for (name, one), other in pairs}
    assert max(worst.values()) < (2e-3 if dtype == torch.float32 else 0.1), max(worst.items(), key=lambda item: item[1])


@pytest.mark.parametrize("options", ["padding", "packed"])
def test_padding_and_packed_documents(options):
    reference = model_of(**SMALL)
    there, tokens = on_gpu(reference, torch.float32), random_tokens(2, 90)
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[0, :17] = 0
    given = {"attention_mask": mask} if options == "padding" else {"position_ids": (torch.arange(90) % 33)[None]}
    with torch.no_grad():
        expected = reference(tokens, use_cache=False, **given).logits
        logits = there(tokens.to(DEVICE), use_cache=False, **{n: t.to(DEVICE) for n, t in given.items()}).logits
    real = mask.bool() if options == "padding" else torch.ones_like(mask).bool()
    assert error(logits[real.to(DEVICE)], expected[real]) < 1e-4


def test_a_model_with_an_adapter_steps_without_the_graph():
    peft = pytest.importorskip("peft")
    model = on_gpu(model_of(**SMALL), torch.bfloat16)
    expected = Stream(model).read(random_tokens(1, 9))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["in_proj"], task_type="CAUSAL_LM"))
    stream = Stream(adapted.get_base_model())
    stream.read(random_tokens(1, 8))
    logits = stream.step(random_tokens(1, 9)[:, -1])
    assert stream._decoder is None
    assert error(logits, expected.cpu().double()) < 2e-2


def test_sampled_tokens_stay_in_the_vocabulary():
    stream = Stream(on_gpu(model_of(**SMALL), torch.bfloat16), rows=4)
    stream.read(random_tokens(4, 3))
    for _ in range(40):
        ids = torch.multinomial(stream.logits.float().softmax(-1), 1)[:, 0]
        assert stream.step(ids).shape == (4, VOCABULARY)
