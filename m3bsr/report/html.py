"""A page out of plain data. One file, nothing loaded from elsewhere, dark or light as the reader's system is.

Every function returns HTML as a string and escapes what it is given.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from m3bsr.report.curves import Series, line_chart
from m3bsr.report.panels import Group, shrink
from m3bsr.report.spread import Spread
from m3bsr.report.style import COLOURS, SCRIPT, STYLE


@dataclass(frozen=True)
class Section:
    """A part of the page; `body` is HTML, made by the functions of this module."""

    title: str
    body: str
    note: str = ""


@dataclass(frozen=True)
class Column:
    """A column of a table. `better` marks the best value of the column."""

    key: str
    label: str
    better: Literal["high", "low", ""] = ""
    digits: int = 4


def write_report(path: str | Path, title: str, sections: Sequence[Section], subtitle: str = "") -> Path:
    """Write the page so that a crash leaves the old one or the new one; returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".writing")
    aside.write_text(page(title, sections, subtitle), encoding="utf-8")
    aside.replace(path)
    return path


def page(title: str, sections: Sequence[Section], subtitle: str = "") -> str:
    """The whole document. Sections without a body are left out."""
    shown = [section for section in sections if section.body]
    links = "".join(f'<a href="#{_anchor(s.title)}">{html.escape(s.title)}</a>' for s in shown)
    parts = [
        f'<section id="{_anchor(s.title)}"><h2>{html.escape(s.title)}</h2>{paragraph(s.note)}{s.body}</section>'
        for s in shown
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # An inline icon keeps browsers from asking for /favicon.ico.
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body><main><header><h1>{html.escape(title)}</h1>{paragraph(subtitle)}<nav>{links}</nav></header>\n"
        + "\n".join(parts)
        + f"\n<footer>Written by m3bsr.</footer></main><script>{SCRIPT}</script></body></html>\n"
    )


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>" if text else ""


def number(value: Any, digits: int = 4) -> str:
    """A value for people: numbers with `digits` significant digits and thousands apart, None as a dash."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value != 0 and abs(value) < 10 ** -(digits - 1):
        return f"{value:.{digits - 1}g}"
    decimals = max(0, digits - 1 - (math.floor(math.log10(abs(value))) if value else 0))
    return f"{value:,.{min(decimals, digits)}f}"


def cards(values: Mapping[str, str]) -> str:
    """Headline values, each with its name."""
    inside = "".join(
        f'<div class="card"><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>' for k, v in values.items()
    )
    return f'<div class="cards">{inside}</div>' if inside else ""


def table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], sortable: bool = True) -> str:
    """A table; missing values are dashes, the best of a column with `better` is marked when rows differ."""
    if not rows:
        return ""
    numeric = {c.key for c in columns if any(_is_number(row.get(c.key)) for row in rows)}
    best = {c.key: _best(c, rows) for c in columns}
    head = "".join(f"<th{_class(c.key in numeric and 'num')}>{html.escape(c.label)}</th>" for c in columns)
    lines = []
    for row in rows:
        cells = []
        for column in columns:
            value = row.get(column.key)
            is_best = best[column.key] is not None and value == best[column.key]
            data = f' data-value="{float(value)!r}"' if _is_number(value) else ""  # type: ignore[arg-type]
            kind = _class(column.key in numeric and "num", is_best and "best", isinstance(value, str) and "wrap")
            apart = f" ± {value.spread:.2g}" if isinstance(value, Spread) and value.spread else ""
            cells.append(f"<td{kind}{data}>{html.escape(number(value, column.digits) + apart)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    name = ' class="sortable"' if sortable and len(rows) > 1 else ""
    return (
        f'<div class="scroll"><table{name}><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _best(column: Column, rows: Sequence[Mapping[str, Any]]) -> float | None:
    values = [row[column.key] for row in rows if _is_number(row.get(column.key))]
    if not column.better or len(set(values)) < 2:
        return None
    return max(values) if column.better == "high" else min(values)


def _class(*names: str | bool) -> str:
    used = " ".join(name for name in names if isinstance(name, str))
    return f' class="{used}"' if used else ""


def heat_map(
    rows: Mapping[str, Sequence[float]],
    extra: Mapping[str, str] | None = None,
    extra_label: str = "",
    *,
    corner: str = "expert",
    columns: Sequence[str] | None = None,
) -> str:
    """A table of shares in per cent, darker where higher.

    Args:
        extra: one more text for each row, under the label `extra_label`.
        columns: names of the columns, their numbers by default; `corner` says what they are.
    """
    if not rows:
        return ""
    width = max(len(values) for values in rows.values())
    top = max((max(values, default=0) for values in rows.values()), default=0) or 1
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in columns or range(width))
    last = f"<th>{html.escape(extra_label)}</th>" if extra else ""
    lines = []
    for name, values in rows.items():
        cells = "".join(
            f'<td style="background:color-mix(in srgb, var(--accent) {90 * value / top:.0f}%, transparent)'
            f'{";color:var(--card)" if value > 0.6 * top else ""}">{100 * value:.0f}</td>'
            for value in values
        )
        end = f"<th>{html.escape(extra.get(name, ''))}</th>" if extra else ""
        lines.append(f"<tr><th>{html.escape(name)}</th>{cells}{end}</tr>")
    return (
        f'<div class="scroll"><table class="heat"><thead><tr><th>{html.escape(corner)}</th>{head}{last}'
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def picture_groups(groups: Sequence[Group], small: bool = False, longest: int = 480) -> str:
    """Pictures in rows that wrap, each with its caption."""
    parts = []
    for group in groups:
        if not group.pictures:
            continue
        figures = "".join(
            f'<figure><img src="{data_uri(shrink(p.pixels, longest))}" alt="{html.escape(p.caption, quote=True)}">'
            f"<figcaption>{html.escape(p.caption)}</figcaption></figure>"
            for p in group.pictures
        )
        size = " small" if small else ""
        title = f"<h3>{html.escape(group.title)}</h3>" if group.title else ""
        parts.append(f'{title}<div class="pictures{size}">{figures}</div>')
    return "".join(parts)


def data_uri(picture: np.ndarray) -> str:
    """A picture as a data URI: PNG, or JPEG where that takes less than half (photographs)."""
    encoded = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(picture)).save(buffer, kind, **options)
        encoded[kind] = buffer.getvalue()
    kind = "jpeg" if len(encoded["jpeg"]) < 0.5 * len(encoded["png"]) else "png"
    return f"data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode()}"


def figures(drawn: Mapping[str, str]) -> str:
    """Charts that are drawn already, side by side, by title."""
    inside = "".join(f"<div><h3>{html.escape(title)}</h3>{svg}</div>" for title, svg in drawn.items() if svg)
    return f'<div class="charts">{inside}</div>' if inside else ""


def charts(titled: Sequence[tuple[str, Series]]) -> str:
    """Line charts side by side."""
    return figures({title: line_chart(series, label=title) for title, series in titled})


def legend(names: Sequence[str]) -> str:
    """Which colour of a chart stands for which series."""
    colours = (f'<i style="background:var(--c{i % COLOURS})"></i>' for i in range(len(names)))
    entries = (f"<span>{colour}{html.escape(name)}</span>" for colour, name in zip(colours, names, strict=True))
    return f'<div class="legend">{"".join(entries)}</div>'


def details(summary: str, body: str, is_open: bool = False) -> str:
    """Something that opens on a click."""
    return f"<details{' open' if is_open else ''}><summary>{html.escape(summary)}</summary>{body}</details>"
