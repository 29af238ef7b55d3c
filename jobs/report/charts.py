"""Plots as SVG elements: they scale with the page, take its colours and hold text as text.

All are drawn 360 units wide, about the width of a telephone, so that text stays readable there.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jobs.report.markup import Element, el

_WIDTH, _HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 18, 22, 36
_ROW = 34
_LABEL_LENGTH = 30
_MOST_STEPS = 150

Format = Callable[[float], str]


def count(value: float) -> str:
    """1234567 as 1.23M, 1234 as 1,234."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:,.0f}" if value == int(value) else f"{value:.3g}"


def percent(value: float) -> str:
    """0.1234 as 12.3 %, 0.0012 as 0.12 %."""
    share = 100 * value
    return f"{share:.0f} %" if share == round(share) else f"{share:.{1 if share >= 1 else 2}f} %"


def figure_of(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"


@dataclass(frozen=True)
class Bar:
    """One bar of `bars`.

    Attributes:
        label: written above it, cut where it is long.
        value: its length.
        text: written at its right.
        most: what the length is relative to; absent: the largest value of all bars.
        kind: `one`, `two` or `failed`.
        limit: where a limit is drawn across it.
    """

    label: str
    value: float
    text: str
    most: float | None = None
    kind: str = "one"
    limit: float | None = None


def bars(rows: Sequence[Bar]) -> Element:
    """Horizontal bars, one below the other, each with its label above it."""
    largest = max((row.value for row in rows), default=0)
    svg = _svg(len(rows) * _ROW + 4)
    for at, row in enumerate(rows):
        top = at * _ROW
        most = (largest if row.most is None else row.most) or 1
        length = min(row.value / most, 1) * _WIDTH
        svg.append(el("text", _cut(row.label), x=0, y=top + 12))
        svg.append(el("text", row.text, x=_WIDTH, y=top + 12, class_="end"))
        svg.append(el("rect", x=0, y=top + 17, width=_WIDTH, height=9, rx=2, class_="track"))
        svg.append(el("rect", x=0, y=top + 17, width=_unit(length), height=9, rx=2, class_=row.kind))
        if row.limit is not None:
            x = _unit(min(row.limit / most, 1) * (_WIDTH - 2) + 1)
            svg.append(el("path", d=f"M{x} {top + 15}v13", class_="mark"))
    return svg


def histogram(
    edges: Sequence[float],
    heights: Sequence[float],
    x_label: str,
    y_label: str,
    marker: tuple[float, str] | None = None,
    outline: Sequence[float] | None = None,
    ticks: Sequence[float] | None = None,
) -> Element:
    """Columns over a scale.

    Args:
        edges: of the columns, [n + 1]; more than can be told apart are drawn as their means.
        heights: [n].
        x_label: of the scale.
        y_label: of the heights.
        marker: a place on the scale and its name.
        outline: other heights [n], drawn as a line.
        ticks: places on the scale that are numbered; absent: round ones.
    """
    frame = _Frame((edges[0], edges[-1]), max([*heights, *(outline or [0])]))
    svg = frame.draw(x_label, y_label, count, ticks, figure_of)
    step = math.ceil(len(heights) / _MOST_STEPS)
    gap = 1 if len(heights) <= 50 else 0
    for low in range(0, len(heights), step):
        part = heights[low : low + step]
        left, right = frame.x(edges[low]), frame.x(edges[min(low + step, len(heights))])
        y = frame.y(sum(part) / len(part))
        if y < frame.bottom:
            size = {"width": _unit(max(right - left - gap, 0.5)), "height": _unit(frame.bottom - y)}
            svg.append(el("rect", x=_unit(left), y=_unit(y), class_="one", **size))
    if outline:
        path = f"M{_unit(frame.x(edges[0]))} {frame.bottom}"
        for left, right, value in zip(edges, edges[1:], outline, strict=False):
            path += f"L{_unit(frame.x(left))} {_unit(frame.y(value))}H{_unit(frame.x(right))}"
        svg.append(el("path", d=path, class_="line-two"))
    if marker:
        _mark(svg, frame, *marker)
    return svg


def lines(
    series: Sequence[tuple[str, Sequence[tuple[float, float | None]]]],
    x_label: str,
    y_label: str,
    form: Format = count,
    x_form: Format = figure_of,
    ticks: Sequence[float] | None = None,
    points: Sequence[tuple[float, float, str]] = (),
    limit: float | None = None,
) -> Element:
    """At most two lines over one scale, the second one dashed.

    Args:
        series: name and points (x, y) of each; a y of None interrupts the line.
        x_label: of the horizontal scale.
        y_label: of the vertical one, which starts at 0.
        form: how heights are written.
        x_form: how places are written.
        ticks: places that are numbered; absent: round ones.
        points: marked points, with their names.
        limit: a height at which a line is drawn across.
    """
    places = [x for _, line in series for x, _ in line]
    heights = [y for _, line in series for _, y in line if y is not None] + [y for _, y, _ in points]
    span = (min(places, default=0), max(places, default=1))
    frame = _Frame(span, max([*heights, *([] if limit is None else [limit])], default=0))
    svg = frame.draw(x_label, y_label, form, ticks, x_form)
    if limit is not None:
        path = f"M{_LEFT} {_unit(frame.y(limit))}H{_WIDTH - _RIGHT}"
        svg.append(el("path", d=path, class_="mark"))
        svg.append(
            el("text", "limit", x=_WIDTH - _RIGHT, y=_unit(frame.y(limit) - 4), class_="end soft halo")
        )
    right = float(_WIDTH - _RIGHT)
    for (name, line), kind in zip(series, ("one", "two"), strict=False):
        path, pen = "", "M"
        for x, height in line:
            if height is not None:
                path += f"{pen}{_unit(frame.x(x))} {_unit(frame.y(height))}"
            pen = "M" if height is None else "L"
        svg.append(el("path", d=path, class_=f"line-{kind}"))
        if len(line) <= 31:
            for x, height in line:
                if height is not None:
                    at, y = _unit(frame.x(x)), _unit(frame.y(height))
                    svg.append(el("circle", cx=at, cy=y, r=2.4, class_=kind))
        if len(series) > 1:  # names at the top right, the last one outermost
            svg.append(el("text", name, x=_unit(right), y=12, class_=f"end {kind}"))
            right -= 6.4 * len(name) + 14
    for x, height, name in points:
        across, down = frame.x(x), frame.y(height)
        svg.append(el("circle", cx=_unit(across), cy=_unit(down), r=4.5, class_="two"))
        left = across > _WIDTH / 2
        where = {"x": _unit(across - 8 if left else across + 8), "class_": "halo end" if left else "halo"}
        svg.append(el("text", name, y=_unit(down - 6 if left else down + 12), **where))
    return svg


class _Frame:
    """Scales and axes of a plot; heights start at 0."""

    bottom = _HEIGHT - _BOTTOM

    def __init__(self, span: tuple[float, float], highest: float) -> None:
        low, high = span
        self._span = (low, high) if high > low else (low - 0.5, low + 0.5)
        self._y_ticks = round_ticks(0, highest or 1, 5)
        self._highest = max(highest or 1, self._y_ticks[-1])

    def x(self, value: float) -> float:
        low, high = self._span
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return self.bottom - value / self._highest * (self.bottom - _TOP)

    def draw(
        self, x_label: str, y_label: str, form: Format, ticks: Sequence[float] | None, x_form: Format
    ) -> Element:
        svg = _svg(_HEIGHT)
        for tick in self._y_ticks:
            y = _unit(self.y(tick))
            svg.append(el("path", d=f"M{_LEFT} {y}H{_WIDTH - _RIGHT}", class_="grid"))
            svg.append(el("text", form(tick), x=_LEFT - 5, y=_unit(self.y(tick) + 4), class_="soft end"))
        for tick in round_ticks(*self._span, 5) if ticks is None else ticks:
            x = _unit(self.x(tick))
            svg.append(el("path", d=f"M{x} {self.bottom}v4", class_="grid"))
            svg.append(el("text", x_form(tick), x=x, y=self.bottom + 17, class_="soft middle"))
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        svg.append(el("text", x_label, x=middle, y=_HEIGHT - 4, class_="soft middle"))
        svg.append(el("text", y_label, x=0, y=12, class_="soft"))
        return svg


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`, at most `most` + 1 of them, at least one.

    Steps are 1, 2 or 5 times a power of ten.
    """
    rough = (high - low) / most
    # Below the smallest normal number there is no power of ten to round to.
    if rough < sys.float_info.min:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)] or [low]


def _mark(svg: Element, frame: _Frame, value: float, name: str) -> None:
    x = frame.x(value)
    svg.append(el("path", d=f"M{_unit(x)} {_TOP}V{frame.bottom}", class_="mark"))
    left = x > _WIDTH / 2
    where = {"x": _unit(x - 5 if left else x + 5), "class_": "halo end" if left else "halo"}
    svg.append(el("text", name, y=_TOP + 9, **where))


def _svg(height: int) -> Element:
    return el("svg", viewBox=f"0 0 {_WIDTH} {height}", xmlns="http://www.w3.org/2000/svg")


def _unit(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _cut(text: str) -> str:
    return text if len(text) <= _LABEL_LENGTH else f"{text[: _LABEL_LENGTH - 1]}…"
