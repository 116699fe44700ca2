"""Small charts as inline SVG: bars, scatters and lines that take their colours from the page.

Every text and attribute is escaped here. Colours are CSS variables, so that light and dark need one
drawing; sizes are in the view box, so that the page scales them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

Scale = Callable[[float], float]
WIDTH, CHART_WIDTH = 760.0, 560.0  # of bars, which have a row to themselves, and of charts
NARROW = 400.0  # of bars on a phone, where names stand above them


@dataclass
class Series:
    """Points (x, y) with an optional band (low, high) and a text for each point."""

    name: str
    points: list[tuple[float, float]]
    colour: str  # a class of the page: "ours", "eager", "peer", "c1" ...
    bands: list[tuple[float, float]] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    diamonds: list[bool] = field(default_factory=list)  # points drawn as such, not as dots
    line: bool = True


def number(value: float) -> str:
    """Short text for a tick: three significant digits, thousands by suffix."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def log_scale(low: float, high: float, start: float, end: float) -> Scale:
    """Positive values to pixels, logarithmic."""
    a, b = math.log10(low), math.log10(high)
    return lambda value: start + (math.log10(value) - a) / ((b - a) or 1.0) * (end - start)


def linear_scale(low: float, high: float, start: float, end: float) -> Scale:
    """Values to pixels."""
    return lambda value: start + (value - low) / ((high - low) or 1.0) * (end - start)


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within; only powers where there are many."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(exponents) <= 4 else (1,)
    return [m * 10.0**e for e in exponents for m in steps if low <= m * 10.0**e <= high * 1.0001]


def linear_ticks(high: float) -> list[float]:
    """About five round steps from zero."""
    raw = high / 5 or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw)
    return [i * step for i in range(int(high / step + 1e-9) + 1)]


def _text(x: float, y: float, content: str, **attributes: str) -> Markup:
    extra = Markup("").join(
        Markup(' {}="{}"').format(name.replace("_", "-"), value)
        for name, value in attributes.items()
    )
    return Markup('<text x="{}" y="{}"{}>{}</text>').format(f"{x:.1f}", f"{y:.1f}", extra, content)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>').format(
        f"{x1:.1f}", f"{y1:.1f}", f"{x2:.1f}", f"{y2:.1f}", kind
    )


LONGEST = 52  # characters of a label at a bar


def shortened(name: str) -> str:
    """A label that fits."""
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


@dataclass(frozen=True)
class Place:
    """Where the bars of a picture begin and end, and where their names stand."""

    width: float
    left: float
    above: float  # room for a name over its bars; 0: it stands beside them

    @classmethod
    def of(cls, groups: Sequence[tuple[str, Any]], narrow: bool) -> Place:
        """Beside them with room for the longest, at 6.6 units a character; above if narrow."""
        if narrow:
            return cls(NARROW, 5.0, 17.0)
        longest = max((len(shortened(name)) for name, _ in groups), default=0)
        return cls(WIDTH, 20.0 + 6.6 * longest, 0.0)

    def name(self, text: str, y: float, beside: float) -> Markup:
        """The name of bars that begin at y below it, or whose middle is at `beside`."""
        if self.above:
            return _text(self.left, y - 5, shortened(text), **{"class": "label"})
        x = self.left - 8
        return _text(x, beside, shortened(text), text_anchor="end", **{"class": "label"})


def frame(height: float, label: str, parts: Sequence[Markup], width: float = WIDTH) -> Markup:
    """The svg element around the parts; `label` is what a screen reader says."""
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}" xmlns="http://www.w3.org/2000/svg">'
        "{}</svg>"
    ).format(f"{width:.0f}", f"{height:.0f}", label, Markup("").join(parts))


ROW = 18.0  # between the rows of a legend


def legend(
    names: Sequence[tuple[str, str]], left: float, y: float, width: float = WIDTH
) -> tuple[list[Markup], float]:
    """(text, colour class) entries in as many rows as they need, and how far down the last is."""
    parts: list[Markup] = []
    x = left
    for name, colour in names:
        needed = 16 + 7.2 * len(name)
        if x > left and x + needed > width:
            x, y = left, y + ROW
        parts.append(
            Markup('<rect x="{}" y="{}" width="11" height="11" class="{}"/>').format(
                f"{x:.0f}", f"{y - 10:.0f}", colour
            )
        )
        parts.append(_text(x + 16, y, name, **{"class": "label"}))
        x += needed + 24
    return parts, y


@dataclass(frozen=True)
class Bar:
    """One bar: value, interval, colour class, text at its end."""

    value: float
    low: float
    high: float
    colour: str
    text: str


def bars(
    groups: Sequence[tuple[str, Sequence[Bar]]],
    label: str,
    names: Sequence[tuple[str, str]],
    *,
    narrow: bool = False,
) -> Markup:
    """Horizontal bars in named groups, with a line at 1."""
    place, right, thick = Place.of(groups, narrow), 130.0, 15.0
    left, width = place.left, place.width
    parts, top = legend(names, left, 16, width)
    top += ROW
    highest = max((bar.high for _, group in groups for bar in group), default=1.0)
    scale = linear_scale(0.0, max(highest, 1.05), left, width - right)
    y = top
    rows: list[Markup] = []
    named: list[Markup] = []
    for name, group in groups:
        y += place.above
        named.append(place.name(name, y, y + thick * len(group) / 2 + 4))
        for bar in group:
            rows.append(
                Markup('<rect x="{}" y="{}" width="{}" height="{}" rx="1.5" class="{}"/>').format(
                    f"{left:.1f}",
                    f"{y:.1f}",
                    f"{scale(bar.value) - left:.1f}",
                    f"{thick - 3:.1f}",
                    bar.colour,
                )
            )
            centre = y + (thick - 3) / 2
            rows.append(_line(scale(bar.low), centre, scale(bar.high), centre, "whisker"))
            rows.append(_text(scale(bar.high) + 6, centre + 4, bar.text, **{"class": "value"}))
            y += thick
        y += 9
    for tick in linear_ticks(max(highest, 1.05)):
        parts.append(_line(scale(tick), top - 4, scale(tick), y, "grid"))
        parts.append(
            _text(scale(tick), y + 14, number(tick), text_anchor="middle", **{"class": "tick"})
        )
    parts += rows
    parts.append(_line(scale(1.0), top - 4, scale(1.0), y, "one"))
    return frame(y + 22, label, parts + named, width)


def stacked(
    groups: Sequence[tuple[str, Sequence[tuple[float, str, str]]]],
    label: str,
    names: Sequence[tuple[str, str]],
    unit: str,
    *,
    narrow: bool = False,
) -> Markup:
    """Horizontal stacks: (name, [(value, colour class, title)])."""
    place, right, thick = Place.of(groups, narrow), 90.0, 20.0
    parts, top = legend(names, place.left, 16, place.width)
    top += ROW
    highest = max((sum(v for v, *_ in stack) for _, stack in groups), default=1.0)
    scale = linear_scale(0.0, highest, place.left, place.width - right)
    y = top
    for name, stack in groups:
        y += place.above
        parts.append(place.name(name, y, y + 14))
        total = 0.0
        for value, colour, title in stack:
            parts.append(
                Markup(
                    '<rect x="{}" y="{}" width="{}" height="{}" class="{}"><title>{}</title></rect>'
                ).format(
                    f"{scale(total):.1f}",
                    f"{y:.1f}",
                    f"{scale(total + value) - scale(total):.1f}",
                    f"{thick:.0f}",
                    colour,
                    title,
                )
            )
            total += value
        parts.append(
            _text(scale(total) + 6, y + 14, f"{number(total)} {unit}", **{"class": "value"})
        )
        y += thick + (10 if name.endswith("ours") else 3)
    return frame(y + 6, label, parts, place.width)


def chart(
    series: Sequence[Series],
    *,
    label: str,
    x_title: str,
    y_title: str,
    log_x: bool = True,
    log_y: bool = True,
    roofs: Sequence[tuple[str, list[tuple[float, float]]]] = (),
    height: float = 360.0,
) -> Markup:
    """Lines or dots over two axes; `roofs` are named limit lines."""
    left, right, bottom, width = 62.0, 16.0, 46.0, CHART_WIDTH
    parts, top = legend([(s.name, s.colour) for s in series], left, 16, width)
    top += ROW - 4
    height += top - 30.0
    everything = [p for s in series for p in s.points] + [p for _, line in roofs for p in line]
    everything += [
        (x, b)
        for s in series
        for (x, _), band in zip(s.points, s.bands, strict=False)
        for b in band
    ]
    xs, ys = [x for x, _ in everything], [y for _, y in everything]
    spread = 1.25
    x_low, x_high = (min(xs) / spread, max(xs) * spread) if log_x else (0.0, max(xs) * 1.05)
    y_low, y_high = (min(ys) / spread, max(ys) * spread) if log_y else (0.0, max(ys) * 1.08)
    x_of = (log_scale if log_x else linear_scale)(x_low, x_high, left, width - right)
    y_of = (log_scale if log_y else linear_scale)(y_low, y_high, height - bottom, top)
    for tick in log_ticks(x_low, x_high) if log_x else linear_ticks(x_high):
        parts.append(_line(x_of(tick), top, x_of(tick), height - bottom, "grid"))
        parts.append(
            _text(
                x_of(tick),
                height - bottom + 16,
                number(tick),
                text_anchor="middle",
                **{"class": "tick"},
            )
        )
    for tick in log_ticks(y_low, y_high) if log_y else linear_ticks(y_high):
        parts.append(_line(left, y_of(tick), width - right, y_of(tick), "grid"))
        parts.append(
            _text(left - 6, y_of(tick) + 4, number(tick), text_anchor="end", **{"class": "tick"})
        )
    for name, line in roofs:
        parts.append(_path([(x_of(x), y_of(y)) for x, y in line], "roof"))
        x, y = line[-1]
        parts.append(_text(x_of(x), y_of(y) - 5, name, text_anchor="end", **{"class": "tick"}))
    for one in series:
        parts += _drawn(one, x_of, y_of)
    parts.append(
        _text(
            (left + width - right) / 2,
            height - 8,
            x_title,
            text_anchor="middle",
            **{"class": "label"},
        )
    )
    parts.append(
        _text(
            14,
            (top + height - bottom) / 2,
            y_title,
            text_anchor="middle",
            transform=f"rotate(-90 14 {(top + height - bottom) / 2:.0f})",
            **{"class": "label"},
        )
    )
    return frame(height, label, parts, width)


def _drawn(one: Series, x_of: Scale, y_of: Scale) -> list[Markup]:
    parts: list[Markup] = []
    dots = [(x_of(x), y_of(y)) for x, y in one.points]
    if one.bands:
        upper = [(x_of(x), y_of(b[1])) for (x, _), b in zip(one.points, one.bands, strict=True)]
        lower = [(x_of(x), y_of(b[0])) for (x, _), b in zip(one.points, one.bands, strict=True)]
        parts.append(_path([*upper, *reversed(lower)], f"band {one.colour}", closed=True))
    if one.line and len(dots) > 1:
        parts.append(_path(dots, f"line {one.colour}"))
    titles = one.titles or [one.name] * len(dots)
    diamonds = one.diamonds or [False] * len(dots)
    for (x, y), title, diamond in zip(dots, titles, diamonds, strict=True):
        parts.append(
            Markup('<path d="{}" class="point {}"><title>{}</title></path>').format(
                f"M{x:.1f} {y - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5Z"
                if diamond
                else f"M{x - 4:.1f} {y:.1f}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
                one.colour,
                title,
            )
        )
    return parts


def _path(points: Sequence[tuple[float, float]], kind: str, *, closed: bool = False) -> Markup:
    steps = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return Markup('<path d="M{}{}" class="{}"/>').format(steps, "Z" if closed else "", kind)


def sparkline(values: Sequence[float], title: str) -> Markup:
    """A tiny line without axes; the last value is marked.

    Its height is a fifth of the value or more, so that noise looks like noise.
    """
    width, height = 90.0, 22.0
    x_of = linear_scale(0, max(len(values) - 1, 1), 4, width - 6)
    middle = (min(values) + max(values)) / 2
    half = max(max(values) - middle, abs(middle) / 10, 1e-12)
    y_of = linear_scale(middle - half, middle + half, height - 4, 4)
    dots = [(x_of(i), y_of(v)) for i, v in enumerate(values)]
    return Markup(
        '<svg viewBox="0 0 {} {}" class="spark" role="img" aria-label="{}"><title>{}</title>{}'
        '<circle cx="{}" cy="{}" r="2.5" class="ours"/></svg>'
    ).format(
        f"{width:.0f}",
        f"{height:.0f}",
        title,
        title,
        _path(dots, "line ours"),
        f"{dots[-1][0]:.1f}",
        f"{dots[-1][1]:.1f}",
    )


__all__ = ["Bar", "Series", "bars", "chart", "escape", "number", "sparkline", "stacked"]
