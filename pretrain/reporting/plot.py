"""The plot of a run's losses, as a PNG."""

from pathlib import Path

from sambalm.pretrain.reporting.metrics_file import LOSS_AT, NAMED_LOSS_AT, read_steps


def plot_losses(run_dir: Path, path: Path, *, baselines: dict[str, float]) -> None:
    """Draws the training and validation losses of a run, with horizontal lines for baselines, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_steps(run_dir)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], label="training", linewidth=1)
    names = sorted({name for r in records for name in r if name.startswith(LOSS_AT)}, key=_length)
    for name in names:
        points = [(r["step"], r[name]) for r in records if name in r]
        axes.plot(*zip(*points, strict=True), "o-", label=f"validation, {_length(name)} tokens", markersize=4)
    for name in sorted({name for r in records for name in r if name.startswith(NAMED_LOSS_AT)}):
        length, _, source = name.removeprefix(NAMED_LOSS_AT).partition("/")
        points = [(r["step"], r[name]) for r in records if name in r]
        axes.plot(*zip(*points, strict=True), "s-", label=f"{source}, {length} tokens", markersize=4)
    for label, value in baselines.items():
        axes.axhline(value, linestyle="--", color="grey", linewidth=0.8)
        axes.annotate(label, (records[-1]["step"], value), ha="right", va="bottom", color="grey", fontsize=8)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _length(name: str) -> int:
    return int(name.removeprefix(LOSS_AT))
