"""One HTML file with everything in it: figures, Plotly that draws them, style. It needs no network."""

import json
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs

from ssd_megatron.reporting import tables
from ssd_megatron.reporting.comparison import comparison_figures
from ssd_megatron.reporting.figures import Figure, run_figures
from ssd_megatron.reporting.run import AXES, Run
from ssd_megatron.reporting.tables import Table


def render(runs: Sequence[Run]) -> str:
    """The page of one run, or of several with a comparison first."""
    page = _Page()
    if len(runs) > 1:
        page.compare(runs)
    for run in runs:
        page.run(run, heading=len(runs) > 1)
    return "\n".join(_document(", ".join(run.name for run in runs), page))


class _Page:
    """Collects HTML, and the figures that page.js puts into it."""

    def __init__(self) -> None:
        self.html: list[str] = []
        self.figures: list[dict[str, Any]] = []

    def compare(self, runs: Sequence[Run]) -> None:
        self.html.append("<section><h2>All runs</h2>")
        self._table(tables.comparison_table(runs))
        self._figures(comparison_figures(runs))
        self._table(tables.difference_table(runs))
        self.html.append("</section>")

    def run(self, run: Run, *, heading: bool) -> None:
        """What there is of one run, under a heading where there are several."""
        self.html.append(f"<section>{f'<h2>{escape(run.name)}</h2>' if heading else ''}<dl>")
        for name, value in tables.facts(run):
            self.html.append(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>")
        self.html.append("</dl>")
        self._figures(run_figures(run))
        self._table(tables.switch_table(run))
        self._table(tables.event_table(run))
        for title, content in (("Configuration", run.config), ("Versions", run.versions)):
            if content is not None:
                text = escape(json.dumps(content, indent=2))
                self.html.append(f"<details><summary>{title}</summary><pre>{text}</pre></details>")
        self.html.append("</section>")

    def _figures(self, figures: Sequence[Figure]) -> None:
        self.html.append('<div class="figures">')
        for figure in figures:
            self.html.append(
                f"<figure><h3>{escape(figure.title)}</h3><p>{escape(figure.note)}</p>"
                f'<div class="chart" id="figure-{len(self.figures)}"></div></figure>'
            )
            self.figures.append(figure.to_json())
        self.html.append("</div>")

    def _table(self, table: Table | None) -> None:
        if table is None:
            return
        self.html.append(f'<h3>{escape(table.title)}</h3><div class="table" tabindex="0"><table>')
        self.html.append(f"<thead>{_row('th', table.header)}</thead><tbody>")
        self.html += [_row("td", row) for row in table.rows]
        self.html.append("</tbody></table></div>")


def _row(cell: str, values: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{cell}>{escape(value)}</{cell}>' for value in values)}</tr>"


def _document(title: str, page: _Page) -> Iterator[str]:
    here = files(__package__)
    data = json.dumps({"axes": AXES, "figures": page.figures}, allow_nan=False, separators=(",", ":"))
    data = data.replace("</", "<\\/")  # within a script it could end it
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{escape(title)}</title><style>{(here / 'page.css').read_text(encoding='utf-8')}</style></head><body>"
    key = "sparse phase; lines and triangles: switches.<span> Drag to zoom in, double-click to zoom out.</span>"
    yield f"<header><h1>{escape(title)}</h1><fieldset><legend>Over</legend>"
    for number, axis in enumerate(AXES):
        checked = " checked" if number == 0 else ""
        name = "FLOPs" if axis == "flops" else axis
        yield f'<label><input type="radio" name="axis" value="{axis}"{checked}><span>{name}</span></label>'
    yield f'</fieldset></header><p class="key"><i></i> {key}</p>'
    yield '<p id="error" hidden></p><main>'
    yield from page.html
    yield "</main>"
    yield f'<script type="application/json" id="data">{data}</script>'
    yield f"<script>{get_plotlyjs()}</script>"
    yield f"<script>{(here / 'page.js').read_text(encoding='utf-8')}</script></body></html>"
