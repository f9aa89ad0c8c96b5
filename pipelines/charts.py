"""Where things lie in the pages' pictures, in pixels of their SVG (y down); the templates draw them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from datetime import date
from itertools import groupby, pairwise
from typing import Any

from pipelines.answers import with_error
from pipelines.windows import Event, Verdict, Window, excess

Point = tuple[float, float]

WIDTH, GUTTER, RIGHT = 1240, 244, 26  # of the history; the gutter holds the names of the columns
LOSS = (30, 196)  # top and bottom of the line chart
STRIPS = (222, 242)  # the middle of the policy's marks, and of the gate's
HEAT = 262  # top of the heat map
ROW = 18
LEAST_SLOTS = 6  # few windows do not become wide
LABEL = 46  # a label of a window, and a number in a cell, take so much
CAP = 3.0  # thresholds; what is further out is drawn as that far, its title says how far
CALM, MOVED = ((244, 247, 250), (205, 218, 232)), ((251, 222, 170), (226, 122, 50))  # from, to: below and above 1


def square_chart(
    curves: Mapping[str, Sequence[Mapping[str, float]]] | None, x: str = "predicted", y: str = "observed"
) -> Verdict | None:
    """Curves of rates as SVG points in a square of 100, y down, scaled to the largest rate."""
    if curves is None:
        return None
    rates = [point[axis] for curve in curves.values() for point in curve for axis in (x, y)]
    step = 0.1 if max(rates) < 0.6 else 0.2
    top = min(1.0, (int(max(rates) / step) + 1) * step)
    place = {
        name: [(100 * point[x] / top, 100 - 100 * point[y] / top) for point in curve] for name, curve in curves.items()
    }
    ticks = [(n * step, 100 * n * step / top) for n in range(round(top / step) + 1)]
    return {"ticks": ticks, "points": place, "lines": {name: _line(points) for name, points in place.items()}}


def history(windows: Sequence[Window], events: Sequence[Event]) -> Verdict:
    """A year at a glance: the losses as lines, marks, and drift by column as a heat map, all on one axis of windows."""
    step = (WIDTH - GUTTER - RIGHT) / max(LEAST_SLOTS, len(windows))
    columns = _columns(windows)
    bottom = HEAT + ROW * len(columns)
    return {
        "width": WIDTH,
        "height": bottom + (26 if columns else -20),
        "gutter": GUTTER,
        "right": WIDTH - RIGHT,
        "end": GUTTER + step * len(windows),
        "step": step,
        "row": ROW,
        "strips": STRIPS,
        "bottom": bottom,
        "losses": _losses(windows, step),
        "labels": _labels(windows, step),
        "policies": [(_middle(i, step), one.decision) for i, one in enumerate(windows)],
        "moves": _moves(windows, events, step),
        "gate": _gate(windows, events, step),
        "heat": [_heat_row(name, weight, at, windows, step) for at, (name, weight) in enumerate(columns.items())],
        "most": max((weight for weight in columns.values() if weight), default=1.0),
        "weighted": any(weight is not None for weight in columns.values()),
        "numbers": step >= LABEL,
    }


def whiskers(rows: Sequence[Sequence[tuple[float, float | None] | None]], size: float) -> list[list[Verdict | None]]:
    """Values with their standard errors on one scale from 0 to ``size``: where the dot lies, and its whisker."""
    known = [value for row in rows for value in row if value]
    low = min((value - (error or 0) for value, error in known), default=0.0)
    high = max((value + (error or 0) for value, error in known), default=1.0)
    scale = size / ((high - low) or 1.0)

    def place(value: tuple[float, float | None] | None) -> Verdict | None:
        if value is None:
            return None
        at, reach = (value[0] - low) * scale, (value[1] or 0) * scale
        return {"at": at, "from": at - reach, "to": at + reach}

    return [[place(value) for value in row] for row in rows]


def shade(far: float) -> str:
    """The colour of a distance in thresholds: calm below one, warm from there on; dark text is legible on each."""
    (start, end), share = (CALM, far) if far < 1 else (MOVED, (min(far, CAP) - 1) / (CAP - 1))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(start, end, strict=True))


def _losses(windows: Sequence[Window], step: float) -> Verdict | None:
    """Realised and estimated log loss with their standard errors, and the champions' own; None where nothing is."""
    realised = [_known(one.realised, "standard_error") for one in windows]
    estimated = [_known(one.verdict["estimate"], "log_loss_standard_error") for one in windows]
    references = [one.reference for one in windows]
    known = [value for value in [*realised, *estimated] if value]
    if not known:
        return None
    reach = [value + sign * (error or 0) for value, error in known for sign in (-1, 1)]
    ticks = _ticks([*reach, *(value for value in references if value is not None)])
    top, bottom = LOSS

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    return {
        "ticks": [(_tick(value, ticks), y(value)) for value in ticks],
        "realised": _series(windows, realised, "realised", y, step),
        "estimated": _series(windows, estimated, "estimated", y, step),
        "references": [
            {"from": _middle(run[0][0], step) - step / 2, "to": _middle(run[-1][0], step) + step / 2, "y": y(value)}
            | {"title": f"v{version} on its own test window: {value:.3f}"}
            for (value, version), group in groupby(
                enumerate(references), key=lambda one: (one[1], windows[one[0]].verdict["version"])
            )
            for run in [list(group)]
            if value is not None
        ],
    }


def _known(found: Verdict | None, error: str) -> tuple[float, float | None] | None:
    return None if not found or found["log_loss"] is None else (found["log_loss"], found[error])


def _series(
    windows: Sequence[Window], values: Sequence[tuple[float, float | None] | None], word: str, y: Any, step: float
) -> Verdict:
    """A line that breaks where nothing is known, a band of one standard error, and points with their titles."""
    places = [(i, *value) for i, value in enumerate(values) if value]
    runs = [[place for _, place in run] for _, run in groupby(enumerate(places), key=lambda one: one[1][0] - one[0])]
    half = min(step / 2, 5.0)
    bands = []
    for run in runs:
        x = [_middle(run[0][0], step) - half, *(_middle(i, step) for i, *_ in run), _middle(run[-1][0], step) + half]
        ends = [run[0], *run, run[-1]]
        upper = [(at, y(value + (error or 0))) for at, (_, value, error) in zip(x, ends, strict=True)]
        lower = [(at, y(value - (error or 0))) for at, (_, value, error) in zip(x, ends, strict=True)]
        bands.append(_line(upper + lower[::-1]))
    return {
        "bands": bands,
        "lines": [_line([(_middle(i, step), y(value)) for i, value, _ in run]) for run in runs],
        "points": [
            (_middle(i, step), y(value), f"{windows[i].name}: {word} {with_error(value, error)}")
            for i, value, error in places
        ],
    }


def _labels(windows: Sequence[Window], step: float) -> list[tuple[float, str]]:
    """Where each window begins, as many as there is room for; a year where a new one begins."""
    every, found, year = math.ceil(LABEL / step), [], 0
    for i, window in enumerate(windows):
        if i % every:
            continue
        start = date.fromisoformat(window.verdict["start"])
        monthly = " to " not in window.name
        text = f"{start:%b}" if monthly else f"{start.day} {start:%b}"
        found.append((_middle(i, step), text if start.year == year or not monthly else f"{text} {start.year}"))
        year = start.year
    return found


def _moves(windows: Sequence[Window], events: Sequence[Event], step: float) -> list[Verdict]:
    """Where another model became champion: by the ledger, and where that is not told, by the windows' versions."""
    found: dict[int, Verdict] = {}
    for i, (before, after) in enumerate(pairwise(windows), start=1):
        version = after.verdict["version"]
        if version and version != before.verdict["version"]:
            found[i] = {"version": version, "title": f"v{version} is champion from here on"}
    for event in events:
        if event["kind"] in ("promote", "force", "rollback") and event["version"]:
            title = f"v{event['version']} champion as of {event['as_of']} ({event['kind']}): {event['summary']}"
            found[_position(windows, event)] = {"version": event["version"], "title": title}
    return [{"x": GUTTER + step * i, **mark} for i, mark in sorted(found.items())]


def _gate(windows: Sequence[Window], events: Sequence[Event], step: float) -> list[Verdict]:
    """What the gate said of the retrainings after a window: one mark a place, the last word's."""
    found: dict[int, list[Event]] = {}
    for event in events:
        if event["kind"] in ("passed", "refused"):
            found.setdefault(_position(windows, event), []).append(event)
    return [
        {"x": GUTTER + step * i, "kind": said[-1]["kind"]}
        | {"title": "\n".join(f"v{one['version']} {one['kind']}: {one['summary']}" for one in said)}
        for i, said in sorted(found.items())
    ]


def _position(windows: Sequence[Window], event: Event) -> int:
    """How many windows had ended by then: the event is drawn between them and the next."""
    return bisect_right(sorted(window.verdict["end"] for window in windows), event["as_of"])


def _columns(windows: Sequence[Window]) -> dict[str, float | None]:
    """Every column that was ever looked at with its newest weight, the heaviest first."""
    found: dict[str, float | None] = {}
    for window in windows:
        for name, column in window.verdict["inputs"]["columns"].items():
            found[name] = found.get(name) if column["weight"] is None else column["weight"]
    return dict(sorted(found.items(), key=lambda one: (-(one[1] or 0), one[0])))


def _heat_row(name: str, weight: float | None, at: int, windows: Sequence[Window], step: float) -> Verdict:
    share = "" if weight is None else f": {weight:.1%} of the importance"
    return {
        "name": name,
        "title": f"{name}{share}",
        "weight": weight,
        "y": HEAT + ROW * at,
        "cells": [
            {"x": GUTTER + step * i, **_cell(name, window.verdict["inputs"]["columns"].get(name))} | {"of": window.name}
            for i, window in enumerate(windows)
        ],
    }


def _cell(name: str, column: Verdict | None) -> Verdict:
    if column is None:
        return {"kind": "unjudged", "fill": None, "text": "", "title": f"{name}: not a column of this champion"}
    far, words = excess(column), f"{name}: {column['words'] or 'not judged'}"
    if far is None:
        empty = bool(column["moved"])
        return {"kind": "empty" if empty else "unjudged", "fill": None, "text": "", "title": words}
    critical = ", critical" if column["critical"] and column["moved"] else ""
    title = f"{words} ({far:.2g} thresholds{critical})"
    return {"kind": "judged", "fill": shade(far), "text": f"{far:.1f}", "title": title}


def _middle(i: int, step: float) -> float:
    return GUTTER + step * (i + 0.5)


def _ticks(values: Sequence[float]) -> list[float]:
    """Four to eight round numbers around the values."""
    low, high = min(values), max(values)
    rough = max((high - low) / 6, 1e-4)
    power = 10 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [n * step for n in range(first, max(last, first + 1) + 1)]


def _tick(value: float, ticks: Sequence[float]) -> str:
    """With as many decimals as tell the ticks apart."""
    return f"{value:.{max(1, math.ceil(-math.log10(ticks[1] - ticks[0]) - 1e-9))}f}"


def _line(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
