"""What the parts of a pipeline must hold."""

from sambalm.model.chunks import chunk_layers
from sambalm.model.config import ModelConfig
from sambalm.model.registry import memory_writers, mixer
from sambalm.parallel.config import ParallelConfig


def check_parts(model: ModelConfig, parallel: ParallelConfig, *, sequence_length: int) -> None:
    """Raises ValueError unless every part has layers, and what a layer reads of another is on its own part."""
    layers = parallel.pipeline_layers
    if parallel.model_chunks > len(model.pattern):
        raise ValueError(
            f"parallel.pipeline x parallel.virtual_pipeline is {parallel.model_chunks}, more than the "
            f"{len(model.pattern)} sublayers of model.pattern: lower them"
        )
    if layers is not None and sum(layers) != len(model.pattern):
        raise ValueError(
            f"parallel.pipeline_layers is {layers}, {sum(layers)} in all, and model.pattern has "
            f"{len(model.pattern)} sublayers: make them equal"
        )
    if parallel.model_chunks == 1:
        return
    chunks = chunk_layers(model, parallel, sequence_length=sequence_length)
    for reader, writer in memory_writers(model.pattern).items():
        if not any(reader in chunk and writer in chunk for chunk in chunks):
            raise ValueError(
                f"parallel.pipeline puts sublayer {reader + 1} of model.pattern on another part than sublayer "
                f"{writer + 1}, whose {mixer(model.pattern[reader]).reads} it reads: lower it, or give "
                "parallel.pipeline_layers that keep them together"
            )
