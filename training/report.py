"""Reports as one HTML page: tables of numbers with their intervals, pictures beside it, and the facts they hold for."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.quality import Estimate

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 }
td, th { border-bottom: 1px solid #ccc; padding: .3em .8em; text-align: right; vertical-align: top }
td:first-child, th:first-child { text-align: left }
small, .note { color: #666 } img { max-width: 100%; border: 1px solid #ddd } pre { overflow: auto; background: #f6f6f6 }
"""


@dataclass(frozen=True)
class Table:
    """Lines of measures; an Estimate is shown with its interval."""

    title: str
    lines: Mapping[str, Mapping[str, Estimate | float]]
    percent: bool = False
    note: str = ""

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for line in self.lines.values() for name in line))

    def cell(self, value: Estimate | float | None) -> tuple[str, str]:
        """A value and its interval, as text."""
        if value is None:
            return "", ""
        if isinstance(value, Estimate):
            return self._number(value.value), f"{self._number(value.low)} to {self._number(value.high)}"
        return self._number(value), ""

    def _number(self, value: float) -> str:
        return f"{value:.1%}" if self.percent else f"{value:.4g}"

    def __str__(self) -> str:
        rows = [self.title]
        for name, line in self.lines.items():
            cells = ((column, *self.cell(line[column])) for column in line)
            rows.append(f"  {name}: " + ", ".join(f"{c} {v}" + (f" ({i})" if i else "") for c, v, i in cells))
        return "\n".join([*rows, *([f"  {self.note}"] if self.note else [])])

    def html(self) -> str:
        """As an HTML table."""
        escaped = html.escape
        head = "".join(f"<th>{escaped(column)}</th>" for column in self.columns)
        rows = []
        for name, line in self.lines.items():
            cells = (self.cell(line.get(column)) for column in self.columns)
            rows.append(f"<tr><td>{escaped(name)}</td>"
                        + "".join(f"<td>{v}<br><small>{i}</small></td>" for v, i in cells) + "</tr>")  # fmt: skip
        note = f"<p class=note>{escaped(self.note)}</p>" if self.note else ""
        return f"<h2>{escaped(self.title)}</h2><table><tr><th></th>{head}</tr>{''.join(rows)}</table>{note}"


def write_html(path: Path, title: str, facts: Mapping[str, Any], tables: list[Table],
               pictures: Mapping[str, str]) -> None:  # fmt: skip
    """Write a page of tables and pictures, {file beside it: what it shows}; it loads nothing from anywhere else."""
    shown = "".join(f"<h2>{html.escape(text)}</h2><img src='{html.escape(name)}'>" for name, text in pictures.items())
    told = html.escape(json.dumps(facts, indent=1, ensure_ascii=False))
    path.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1>{''.join(table.html() for table in tables)}{shown}"
        f"<h2>All of it</h2><pre>{told}</pre></html>\n", encoding="utf-8",
    )  # fmt: skip


def plain(lines: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Measures for JSON: an estimate as [value, low, high]."""
    return {name: {k: list(v) if isinstance(v, Estimate) else v for k, v in line.items()}
            for name, line in lines.items()}  # fmt: skip
