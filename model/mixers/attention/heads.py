"""How attention heads are dealt to tensor-parallel ranks, for any number of query heads, kv heads and ranks."""

from dataclasses import dataclass

from sambalm.model.mixers.attention.sizes import AttentionSizes
from sambalm.parallel.shard import Place, Position, Shard, shard


@dataclass(frozen=True)
class HeadShare:
    """One rank's heads, as shares of the query width and of the key (and value) width."""

    query: Shard
    kv: Shard
    kv_heads: int
    kv_copies: int  # tensor-parallel ranks that hold the same kv heads; they add up their gradients
    owns_kv: bool  # whether this rank's copy is the first


def kv_copies(config: AttentionSizes, tensor_parallel_size: int) -> int:
    """Returns how many ranks share each kv head: one while there are enough kv heads for all ranks.

    Raises:
        ValueError: the heads cannot be dealt to so many ranks.
    """
    if tensor_parallel_size <= config.num_kv_heads:
        return 1
    copies, rest = divmod(tensor_parallel_size, config.num_kv_heads)
    group = config.num_query_heads // config.num_kv_heads
    if rest or copies > group:
        raise ValueError(
            f"{config.num_query_heads} query heads with {config.num_kv_heads} kv heads cannot be dealt to "
            f"{tensor_parallel_size} tensor-parallel ranks"
        )
    return copies


def share_heads(config: AttentionSizes, place: Place) -> HeadShare:
    """Deals whole kv heads with all their query heads where there are enough; else one kv head and a share of its
    queries.

    Raises:
        ValueError: the heads cannot be dealt to so many ranks.
    """
    copies, head_dim = kv_copies(config, place.size), config.head_dim
    group_width = config.hidden_size // config.num_kv_heads  # of the query heads that read one kv head
    owner, member = divmod(place.rank, copies)
    kv = shard(config.kv_size, Position(rank=owner, size=place.size // copies), unit=head_dim)
    within = shard(group_width, Position(rank=member, size=copies), unit=head_dim)
    kv_heads = kv.length // head_dim
    first = kv.start // head_dim * group_width
    return HeadShare(
        query=Shard(config.hidden_size, first + within.start, kv_heads * within.length),
        kv=kv,
        kv_heads=kv_heads,
        kv_copies=copies,
        owns_kv=member == 0,
    )
