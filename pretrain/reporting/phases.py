"""The phases of a run in words and as tables."""

import itertools

from sambalm.data_pipeline.blend import blend_draws, describe_draws, sum_draws
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.run_phases import phase_line


def describe_blend(config: RunConfig) -> str:
    """What a run draws from each source by its phases and in all, from the manifests alone.

    Raises:
        DataError: as `blend_draws`.
    """
    schedule = config.schedule
    draws = [blend_draws(phase.config.data, tokens=phase.tokens) for phase in schedule.phases]
    if not schedule.is_phased:
        return describe_draws(draws[0])
    parts = [
        f"{phase_line(schedule, phase)}\n{describe_draws(drawn, warns=False)}"
        for phase, drawn in zip(schedule.phases, draws, strict=True)
    ]
    return "\n\n".join([*parts, f"all phases\n{describe_draws(sum_draws(draws))}"])


def phase_rows(config: RunConfig) -> list[dict[str, str]]:
    """Returns what a report shows of each phase, by the name of a column; nothing of a run without phases."""
    schedule, rows, step = config.schedule, [], 0
    for phase in schedule.phases if schedule.is_phased else ():
        train, data = phase.config.train, phase.config.data
        shares = [f" ({weight / sum(data.weights):.0%})" for weight in data.weights] if data.weights else []
        named = itertools.zip_longest(data.prefixes, shares, fillvalue="")
        rows.append(
            {
                "phase": f"{phase.number + 1}",
                "steps": f"{step + 1:,} to {step + train.steps:,}",
                "tokens": f"{phase.tokens:,}",
                "sequence length": f"{phase.length:,}",
                "global batch": f"{train.global_batch_tokens:,}",
                "peak learning rate": f"{phase.config.optimizer.peak_lr:g}",
                "sources": ", ".join(f"{prefix}{share}" for prefix, share in named),
            }
        )
        step += train.steps
    return rows
