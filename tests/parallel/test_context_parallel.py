"""What context-parallel ranks send each other: the right values both ways, and as few bytes for any length."""

import pytest
import torch

from sambalm.model.config import ModelConfig
from sambalm.parallel.config import ParallelConfig
from tests.support.benchmark_files import load_benchmark
from tests.support.marks import slow_except
from tests.support.worlds import run_world

sent = load_benchmark("context_parallel")
BATCH, WIDTH, STATES = 2, 3, 4


def tokens_before_on_rank(part_tokens: int, tokens: int) -> tuple:
    """What a rank fetches, and the gradient of its own tokens when each fetched token weighs its own amount."""
    from sambalm.parallel.environment import world_size
    from sambalm.parallel.groups import start_world
    from sambalm.parallel.layers.context_parallel import HaloExchange

    with start_world(ParallelConfig(context=world_size())) as world:
        cp = world.context
        whole = torch.randn(BATCH, part_tokens * cp.size, WIDTH, generator=torch.Generator().manual_seed(0))
        own = cp.part(whole).clone().requires_grad_()
        fetched = HaloExchange(own, tokens, cp=cp).wait()
        (fetched * _weights(cp.rank, fetched)).sum().backward()
    return fetched.detach().numpy(), own.grad.numpy()


def _weights(rank: int, fetched: torch.Tensor) -> torch.Tensor:
    return torch.randn(fetched.shape, generator=torch.Generator().manual_seed(rank + 1))


# One neighbour, all of one, several, more than there are before any rank but the last, everything, nothing.
@pytest.mark.parametrize(
    ("part_tokens", "tokens"),
    slow_except([(8, 3), (3, 7), (4, 0)], [(8, 3), (4, 4), (3, 7), (2, 5), (2, 100), (4, 0)]),
)
def test_tokens_before_equal_a_slice_of_the_whole_both_ways(part_tokens, tokens):
    ranks = 4
    whole = torch.randn(BATCH, part_tokens * ranks, WIDTH, generator=torch.Generator().manual_seed(0))
    whole.requires_grad_()
    results = run_world(tokens_before_on_rank, part_tokens, tokens, ranks=ranks)
    for rank, (fetched, _) in enumerate(results):
        start = rank * part_tokens
        expected = whole[:, max(0, start - tokens) : start]
        assert torch.equal(torch.from_numpy(fetched), expected)
        (expected * _weights(rank, expected)).sum().backward()
    gradient = torch.cat([torch.from_numpy(gradient) for _, gradient in results], dim=1)
    torch.testing.assert_close(gradient, whole.grad)


def state_on_rank() -> tuple:
    """The state at a rank's start and the gradients of its factors."""
    from sambalm.parallel.environment import world_size
    from sambalm.parallel.groups import start_world
    from sambalm.parallel.layers.context_parallel import incoming_state

    with start_world(ParallelConfig(context=world_size())) as world:
        rank = world.context.rank
        decay, reached = (factor[rank].clone().requires_grad_() for factor in _factors(world.context.size))
        state = incoming_state(decay, reached, cp=world.context)
        (state * (rank + 1)).sum().backward()
    return state.detach().numpy(), decay.grad.numpy(), reached.grad.numpy()


def _factors(ranks: int) -> torch.Tensor:
    factors = torch.rand(2, ranks, BATCH, WIDTH, STATES, generator=torch.Generator().manual_seed(3))
    return factors.double()


@pytest.mark.parametrize("ranks", [2, 4])
def test_states_at_start_equal_a_loop_over_ranks_both_ways(ranks):
    decay, reached = (factor.clone().requires_grad_() for factor in _factors(ranks))
    state, states = torch.zeros_like(reached[0]), []
    for rank in range(ranks):
        states.append(state)
        state = decay[rank] * state + reached[rank]
    sum((state * (rank + 1)).sum() for rank, state in enumerate(states)).backward()
    for rank, found in enumerate(run_world(state_on_rank, ranks=ranks)):
        for values, expected in zip(found, (states[rank], decay.grad[rank], reached.grad[rank]), strict=True):
            assert torch.from_numpy(values).dtype == torch.float64
            torch.testing.assert_close(torch.from_numpy(values), expected.detach(), rtol=1e-13, atol=1e-15)


MODEL = {"hidden_size": 16, "num_query_heads": 4, "num_kv_heads": 2, "mlp_size": 8, "window": 5, "vocab_size": 32}


def bytes_on_rank(letter: str, length: int) -> tuple[int, int]:
    """Bytes that a rank hands to torch.distributed for others in one sublayer's forward, and in its backward."""
    from sambalm.parallel.environment import world_size
    from sambalm.parallel.groups import start_world

    with start_world(ParallelConfig(context=world_size())) as world:
        return sent.count_sent(ModelConfig(pattern=letter, **MODEL), batch=BATCH, length=length, cp=world.context)


@pytest.mark.parametrize("letter", ["M", "*", "-"])
@pytest.mark.parametrize("ranks", slow_except([4], [2, 4]))
def test_bytes_sent_are_the_formulas_and_do_not_grow_with_the_sequence(letter, ranks):
    short, long = (run_world(bytes_on_rank, letter, length, ranks=ranks) for length in (32, 128))
    assert short == long
    for rank, (forward, backward) in enumerate(short):
        assert forward == _bytes(letter, to_neighbour=rank < ranks - 1, ranks=ranks)
        assert backward == _bytes(letter, to_neighbour=rank > 0, ranks=ranks)
    if ranks > 2:
        formula = {"M": sent.passed_states, "*": sent.passed_window, "-": lambda config, cut: 0}[letter]
        inner = formula(ModelConfig(pattern=letter, **MODEL), sent.Shard(128, ranks, element_bytes=4))
        assert sum(long[1]) == sum(long[2]) == BATCH * inner


def _bytes(letter: str, *, to_neighbour: bool, ranks: int) -> int:
    """fp32. To one neighbour the convolution's or the window's tokens; to every other rank decay and state."""
    config = ModelConfig(pattern=letter, **MODEL)
    conv = (config.d_conv - 1) * config.inner_size * to_neighbour
    states = (ranks - 1) * 2 * config.inner_size * config.d_state
    window = (config.window - 1) * 2 * config.kv_size * to_neighbour
    return 4 * BATCH * {"M": conv + states, "*": window, "-": 0}[letter]


def test_what_a_neighbour_sends_grows_only_until_its_part_is_as_long_as_the_window():
    totals = [sum(map(sum, run_world(bytes_on_rank, "*", length, ranks=4))) for length in (8, 16, 64)]
    window, kv = MODEL["window"], 2 * MODEL["num_kv_heads"] * MODEL["hidden_size"] // MODEL["num_query_heads"]
    for total, length in zip(totals, (8, 16, 64), strict=True):
        fetched = sum(min(window - 1, rank * length // 4) for rank in range(4))
        assert total == 2 * 4 * BATCH * fetched * kv, length
    assert totals[0] < totals[1] == totals[2]


def order_on_rank(letter: str) -> tuple[list[str], list[str]]:
    """What happens in a sublayer's forward and backward: kernels, and the exchanges' beginnings and ends."""
    from dataclasses import replace

    from sambalm.model.ops.registry import TORCH_KERNELS
    from sambalm.model.samba import Samba
    from sambalm.parallel.groups import start_world
    from sambalm.parallel.layers import context_parallel
    from sambalm.parallel.sharding import initialize_parameters

    events: list[str] = []

    def recorded(kernel, event="kernel"):
        def run(*args, **kwargs):
            events.append(event)
            result = kernel(*args, **kwargs)
            output = result[0] if isinstance(result, tuple) else result
            output.register_hook(lambda gradient: events.append(event))
            return result

        return run

    with start_world(ParallelConfig(context=2)) as world, pytest.MonkeyPatch.context() as monkeypatch:
        kernels = replace(
            TORCH_KERNELS,
            conv=recorded(TORCH_KERNELS.conv),
            scan=recorded(TORCH_KERNELS.scan, "scan"),
            attention=recorded(TORCH_KERNELS.attention),
        )
        model = Samba(ModelConfig(pattern=letter, **MODEL), cp=world.context, kernels=kernels)
        initialize_parameters(model, seed=0)
        for name in ("post", "wait"):
            method = getattr(context_parallel._Exchange, name)
            # `name` and `method` are bound now, since the loop goes on.
            monkeypatch.setattr(
                context_parallel._Exchange,
                name,
                lambda self, *args, name=name, method=method: (events.append(name), method(self, *args))[1],
            )
        tokens = torch.zeros(BATCH, 16, dtype=torch.int64)
        loss = model(tokens, tokens).mean()
        forward, events[:] = events.copy(), []
        loss.backward()
    return forward, events


@pytest.mark.parametrize("letter", ["M", "*"])
def test_local_work_runs_while_messages_are_under_way(letter):
    """The kernel call without neighbours' tokens lies between the exchange's beginning and its end.

    The first rank and the last one scan once, from zero and from the state before.
    """
    scan = ["scan"] if letter == "M" else []
    for forward, backward in run_world(order_on_rank, letter, ranks=2):
        assert forward == ["post", "kernel", "wait", "kernel", *scan]
        assert backward == [*scan, "kernel", "post", "kernel", "wait"]
