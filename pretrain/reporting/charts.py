"""Line charts as SVG that stands in an HTML page: no script, no fonts, colours from the page's style sheet."""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 36
COLOURS, DASHES = 8, ("", "6 3", "2 3", "8 3 2 3")
_BUCKETS = 240  # points of a line; what lies between becomes a band
_MARKED = 40  # lines of fewer points show each


@dataclass(frozen=True)
class Series:
    """A line: its points, of which those that are not finite leave a gap, and its place among colours and dashes."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dash: int = 0


@dataclass(frozen=True)
class Chart:
    """A chart of some series over the same x.

    Attributes:
        baselines: horizontal lines by name.
        is_log: whether y has a logarithmic scale, on which only positive values show.
        from_zero: whether y starts at 0.
    """

    title: str
    series: Sequence[Series]
    x_name: str
    y_name: str
    baselines: Sequence[tuple[str, float]] = ()
    is_log: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class _Bucket:
    x: float
    mean: float
    low: float
    high: float


class _Scale:
    """Maps values to pixels."""

    def __init__(self, low: float, high: float, *, start: float, end: float, is_log: bool = False) -> None:
        if high <= low:
            low, high = low - 0.5, low + 0.5
        self.low, self.high, self._start, self._end, self._is_log = low, high, start, end, is_log

    def __call__(self, value: float) -> float:
        low, high, value = map(self._unit, (self.low, self.high, value))
        return self._start + (value - low) / (high - low) * (self._end - self._start)

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self._is_log else linear_ticks(self.low, self.high)

    def _unit(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self._is_log else value


def draw(chart: Chart) -> str:
    """The chart as a figure with a legend; without a point, one that says so."""
    lines = [(series, _buckets(series.points, is_log=chart.is_log)) for series in chart.series]
    lines = [(series, runs) for series, runs in lines if runs]
    title = f"<figcaption>{html.escape(chart.title)}</figcaption>"
    if not lines:
        return f'<figure class="chart">{title}<p class="none">nothing recorded</p></figure>'
    buckets = [bucket for _, runs in lines for run in runs for bucket in run]
    x = _Scale(min(b.x for b in buckets), max(b.x for b in buckets), start=LEFT, end=WIDTH - RIGHT)
    low, high = _range(chart, buckets)
    y = _Scale(low, high, start=HEIGHT - BOTTOM, end=TOP, is_log=chart.is_log)
    highest = max(bucket.high for bucket in buckets)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(chart.title, quote=True)}">',
        *_axes(chart, x, y),
        f'<svg x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}" '
        f'viewBox="{LEFT} {TOP} {WIDTH - LEFT - RIGHT} {HEIGHT - TOP - BOTTOM}">',
        *(part for series, runs in lines for part in _line(series, runs, x, y)),
        "</svg>",
        *(_baseline(name, value, y) for name, value in chart.baselines),
        "</svg>",
    ]
    if highest > y.high + 1e-9 * abs(y.high):
        place = f'x="{WIDTH - RIGHT - 2}" y="{TOP + 10}" text-anchor="end"'
        parts.insert(-1, f"<text {place}>up to {short(highest)}</text>")
    return f'<figure class="chart">{title}{"".join(parts)}{_legend([series for series, _ in lines])}</figure>'


def linear_ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Round numbers from low to high, about so many."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from low to high, and between them where there are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: 1 + len(ticks) // 8]


def short(value: float) -> str:
    """A number in a few characters, such as 1.5k, 20M, 3e-5."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    if 0 < abs(value) < 0.01:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:.4g}"


def _buckets(points: Iterable[tuple[float, float]], *, is_log: bool) -> list[list[_Bucket]]:
    """Runs of neighbouring points, gathered so that few are left."""
    known = list(points)
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in known:
        if math.isfinite(x) and math.isfinite(y) and not (is_log and y <= 0):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    size = max(1, math.ceil(sum(map(len, runs)) / _BUCKETS))
    found = []
    for run in filter(None, runs):
        groups = [run[start : start + size] for start in range(0, len(run), size)]
        found.append([_bucket(group) for group in groups])
    return found


def _bucket(group: Sequence[tuple[float, float]]) -> _Bucket:
    values = [y for _, y in group]
    return _Bucket(fmean(x for x, _ in group), fmean(values), min(values), max(values))


def _range(chart: Chart, buckets: Sequence[_Bucket]) -> tuple[float, float]:
    """Of y, without the few largest values, which would flatten all others."""
    values = sorted(bucket.mean for bucket in buckets)
    low, high = values[0], values[min(len(values) - 1, math.floor(0.98 * len(values)))]
    shown = [value for _, value in chart.baselines]
    low, high = min([low, *shown]), max([high, *shown])
    if chart.is_log:
        return low / 1.2, high * 1.2
    low = 0.0 if chart.from_zero else low
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return low - margin * (not chart.from_zero), high + margin


def _axes(chart: Chart, x: _Scale, y: _Scale) -> Iterable[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for tick in y.ticks():
        at = f"{y(tick):.1f}"
        yield f'<line class="grid" x1="{LEFT}" y1="{at}" x2="{right}" y2="{at}"/>'
        yield f'<text x="{LEFT - 6}" y="{at}" dy="4" text-anchor="end">{short(tick)}</text>'
    for tick in (tick for tick in x.ticks() if math.isclose(tick, round(tick))):  # steps and tokens are whole
        at = f"{x(tick):.1f}"
        yield f'<line class="axis" x1="{at}" y1="{bottom}" x2="{at}" y2="{bottom + 4}"/>'
        yield f'<text x="{at}" y="{bottom + 17}" text-anchor="middle">{short(tick)}</text>'
    yield f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>'
    yield f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{html.escape(chart.x_name)}</text>'
    middle = (TOP + bottom) / 2
    turned = f'transform="translate(11 {middle}) rotate(-90)" text-anchor="middle"'
    yield f"<text {turned}>{html.escape(chart.y_name)}</text>"


def _line(series: Series, runs: Sequence[Sequence[_Bucket]], x: _Scale, y: _Scale) -> Iterable[str]:
    colour = f"c{series.colour % COLOURS}"
    name = f"<title>{html.escape(series.name)}</title>"
    dash = DASHES[series.dash % len(DASHES)]
    style = f' stroke-dasharray="{dash}"' if dash else ""
    is_marked = sum(map(len, runs)) <= _MARKED
    for run in runs:
        if any(bucket.high > bucket.low for bucket in run):
            above = [f"{x(b.x):.1f},{y(b.high):.1f}" for b in run]
            below = [f"{x(b.x):.1f},{y(b.low):.1f}" for b in reversed(run)]
            yield f'<polygon class="band {colour}" points="{" ".join(above + below)}"/>'
        points = " ".join(f"{x(b.x):.1f},{y(b.mean):.1f}" for b in run)
        yield f'<polyline class="line {colour}"{style} points="{points}">{name}</polyline>'
        for bucket in run if is_marked else ():
            told = f"<title>{html.escape(series.name)}, {short(bucket.x)}: {bucket.mean:.5g}</title>"
            place = f'cx="{x(bucket.x):.1f}" cy="{y(bucket.mean):.1f}" r="2.5"'
            yield f'<circle class="dot {colour}" {place}>{told}</circle>'


def _baseline(name: str, value: float, y: _Scale) -> str:
    at, right = f"{y(value):.1f}", WIDTH - RIGHT
    return (
        f'<line class="baseline" x1="{LEFT}" y1="{at}" x2="{right}" y2="{at}"/>'
        f'<text x="{right - 2}" y="{at}" dy="-3" text-anchor="end">{html.escape(name)} {value:.3f}</text>'
    )


def _legend(series: Sequence[Series]) -> str:
    entries = [
        f'<li><svg viewBox="0 0 26 10" aria-hidden="true"><line class="line c{one.colour % COLOURS}" '
        f'stroke-dasharray="{DASHES[one.dash % len(DASHES)]}" x1="1" y1="5" x2="25" y2="5"/></svg>'
        f"{html.escape(one.name)}</li>"
        for one in series
    ]
    return f'<ul class="legend">{"".join(entries)}</ul>' if len(series) > 1 else ""
