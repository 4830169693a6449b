"""A profile as a picture: latency over size, and bandwidth over size, one line per tier and direction.

matplotlib is imported when a picture is asked for (extra `plot`); no display is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from penstock.bench.probe.table import shown_rate, shown_seconds, shown_size
from penstock.errors import ConfigError
from penstock.profile import Direction, Profile

__all__ = ["check_plot", "spread", "write_plot"]

# Okabe and Ito's colours, which people who see colours differently, and printers, tell apart; without the yellow.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STYLES = {
    Direction.READ: "-",
    Direction.WRITE: "--",
    Direction.COPY: "-.",
    Direction.COPYTO: ":",
    Direction.HOLDS: (0, (1, 3)),
    Direction.TO_DEVICE: "-",
    Direction.FROM_DEVICE: "--",
}
_WIDTH, _HEIGHT, _DPI = 13.0, 6.0, 150
_LINE_HEIGHT = 0.041
"""Of a label, as a part of the panel's height; a panel with more lines than fit is made higher."""
_LABEL_WIDTH = 26


@dataclass(frozen=True, slots=True)
class _Line:
    label: str
    colour: str
    marker: str
    style: Any
    sizes: list[int]
    values: list[float]


def check_plot(path: Path) -> None:
    """Raise ConfigError if a picture could not be written in the end: better now than after a minute of measuring."""
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'penstock[plot]'")
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--plot {path}: the picture is a PNG; give a name that ends in .png")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.absolute().parent}; make it first")


def write_plot(profile: Profile, path: Path) -> None:
    """Draw both panels into a PNG. Raises ConfigError if the file cannot be written."""
    from matplotlib.figure import Figure

    latency, bandwidth = _lines(profile, bandwidth=False), _lines(profile, bandwidth=True)
    height = max(_HEIGHT, _HEIGHT * _LINE_HEIGHT * (1.2 * max(len(latency), len(bandwidth))))
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, latency, "Latency of one access (median)", shown_seconds, _HEIGHT / height)
    _draw(right, bandwidth, "Bandwidth", lambda value: shown_rate(value / 1e9), _HEIGHT / height)
    figure.suptitle(f"{profile.machine.get('cpu', '')}, {profile.made_at[:10]}", fontsize=11, x=0.01, ha="left")
    try:
        figure.savefig(path, dpi=_DPI)
    except OSError as error:
        raise ConfigError(f"--plot {path} cannot be written ({error.strerror})") from error


def _lines(profile: Profile, *, bandwidth: bool) -> list[_Line]:
    lines = []
    for n, tier in enumerate(profile.tiers):
        for model in tier.models:
            points = [point for point in tier.points if point.direction == model.direction]
            if bandwidth:
                pairs = [(point.size_bytes, 1e9 * point.gb_s) for point in points if point.gb_s]
            else:
                pairs = [(point.size_bytes, point.latency_us_p50 / 1e6) for point in points]
            if pairs:
                sizes, values = [size for size, _ in pairs], [value for _, value in pairs]
                label = f"{_short(tier.name)} {model.direction}"
                colour, marker = _COLOURS[n % len(_COLOURS)], _MARKERS[n % len(_MARKERS)]
                lines.append(_Line(label, colour, marker, _STYLES[model.direction], sizes, values))
    return lines


def _draw(axes: Any, lines: Sequence[_Line], title: str, shown: Any, scale: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    for line in lines:
        axes.plot(
            line.sizes, line.values, color=line.colour, linestyle=line.style, linewidth=1.6, marker=line.marker,
            markersize=4,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("size of one access")
    sizes = sorted({size for line in lines for size in line.sizes})
    axes.set_xticks(sizes[:: -(-len(sizes) // 7)] if sizes else [])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shown_size(round(value))))
    axes.yaxis.set_major_locator(LogLocator(numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=9)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _label(axes, lines, scale)


def _label(axes: Any, lines: Sequence[_Line], scale: float) -> None:
    """Each line's name to the right of its end, moved apart where ends are close, with a thin line to its end."""
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [to_axes.transform((line.sizes[-1], line.values[-1])) for line in lines]
    places = spread([float(end[1]) for end in ends], _LINE_HEIGHT * scale)
    for line, end, place in zip(lines, ends, places):
        axes.annotate(
            line.label, xy=end, xytext=(1.06, place), xycoords="axes fraction", textcoords="axes fraction",
            va="center", fontsize=8.5, color=line.colour, annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": line.colour, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 1,
                "shrinkB": 3,
            },
        )  # fmt: skip


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places from 0 to 1 in the order of `wanted`, at least `gap` apart, near to what is wanted.

    Neighbours that are too close form a group around their mean; groups that then touch become one.
    """
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    groups: list[list[int]] = []
    for index in order:
        groups.append([index])
        while len(groups) > 1 and _touch(groups[-2], groups[-1], wanted, gap):
            groups[-2:] = [groups[-2] + groups[-1]]
    places = [0.0] * len(wanted)
    for group in groups:
        for n, index in enumerate(group):
            places[index] = _bottom(group, wanted, gap) + n * gap
    return places


def _touch(below: Sequence[int], above: Sequence[int], wanted: Sequence[float], gap: float) -> bool:
    return _bottom(above, wanted, gap) < _bottom(below, wanted, gap) + gap * len(below)


def _bottom(group: Sequence[int], wanted: Sequence[float], gap: float) -> float:
    """Where a group's lowest label goes."""
    height = gap * (len(group) - 1)
    centre = sum(wanted[index] for index in group) / len(group)
    return max(0.0, min(1 - height, centre - height / 2))


def _short(name: str) -> str:
    """The name, its middle left out where it is long."""
    if len(name) <= _LABEL_WIDTH:
        return name
    return f"{name[:8]}…{name[-(_LABEL_WIDTH - 9) :]}"
