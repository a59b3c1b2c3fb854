import json
import re
import runpy
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from ssd_megatron.reporting.page import render
from ssd_megatron.reporting.run import AXES, read_runs
from tests.reporting.runs import write_run

TOOL = Path(__file__).parents[2] / "tools" / "report.py"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def data_of(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data: dict[str, Any] = json.loads(text)
    return data


def rows_of(page: str, title: str) -> list[list[str]]:
    table = page.split(f"<h3>{title}</h3>", 1)[1].split("</table>", 1)[0]
    return [
        [unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", table)
    ]


def test_a_page_holds_figures_facts_and_tables_of_a_run(tmp_path: Path) -> None:
    page = render(read_runs([write_run(tmp_path / "run")]))
    assert len(data_of(page)["figures"]) == page.count('class="chart"') == 10
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert facts == {
        "status": "finished",
        "steps": "200 of 200",
        "validation loss, dense": "3.1000",
        "validation loss, sparse": "3.4000",
        "FLOPs": "175T",
        "FLOPs saved": "12.5%",
        "time": "0:01:35",
        "time saved": "8.9%",
        "tokens": "819k",
        "tokens/s, dense": "8.19k",
        "tokens/s, sparse": "16.4k",
        "peak memory": "2MB",
    }
    header, first, second = rows_of(page, "Switches")
    assert len(header) == len(first) == len(second)
    assert dict(zip(header, first, strict=True)) == {
        "step": "101",
        "switch": "dense -> sparse",
        "reason": "stable",
        "seconds": "1.000",
        "statistics": "0.500",
        "cluster": "0.250",
        "transfer": "0.125",
        "verify": "0.062",
        "other": "0.062",
        "moved": "12MB",
        "dense loss before -> after": "3.2500 -> 3.2500",
        "sparse loss": "3.5000",
        "similarity": "0.625",
        "experts by layer": "6 2",
        "imbalance": "1.50 -> 1.10",
    }
    assert second[-3:] == ["-", "6 2", "-"]
    assert rows_of(page, "Events")[1:] == [["200", "fault", "what the loss rose after the last switch </script>"]]
    assert "https://" not in page.split("<script>", 1)[0]


def test_several_runs_are_compared_with_what_was_set_differently(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", steps=120, lr=0.002)]
    page = render(read_runs(runs))
    assert rows_of(page, "What was set differently") == [
        ["setting", "a", "b"],
        ["optimizer.params.lr", "0.001", "0.002"],
    ]
    results = {row[0]: row[1:] for row in rows_of(page, "Results")}
    assert results["status"] == ["finished", "not ended"] and results["steps"] == ["200 of 200", "120 of 200"]
    assert [len(data_of(page)["figures"]), page.count("<h2>")] == [3 + 2 * 10, 3]


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(TOOL), run_name="__main__")
    return exit_.value.code


def test_the_tool_writes_beside_the_metrics_or_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = write_run(tmp_path / "run", steps=20)
    assert run_tool(monkeypatch, str(run_dir)) == 0
    assert capsys.readouterr().out == f"{run_dir / 'report.html'}\n" and (run_dir / "report.html").exists()
    assert run_tool(monkeypatch, str(run_dir), "--out", str(tmp_path / "new" / "page.html")) == 0
    assert (tmp_path / "new" / "page.html").exists()
    assert run_tool(monkeypatch, str(tmp_path / "none")) == 2
    assert f"error: {tmp_path / 'none'} has no metrics.jsonl" in capsys.readouterr().err
    assert run_tool(monkeypatch, str(run_dir), "--out", str(tmp_path)) == 1
    assert capsys.readouterr().err.startswith("error: [Errno 21] Is a directory: ")


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt install chromium")
def test_a_browser_draws_every_figure_over_the_axis_of_the_address_without_an_error(tmp_path: Path) -> None:
    assert BROWSER is not None
    path = tmp_path / "page.html"
    path.write_text(render(read_runs([write_run(tmp_path / "run"), write_run(tmp_path / "b", steps=5)])))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run([*command, f"file://{path}#seconds"], capture_output=True, text=True, timeout=600, check=True)
    assert re.findall(r'<p id="error"[^>]*>(.*?)</p>', done.stdout, re.DOTALL) == [""]
    assert done.stdout.count('class="plot-container') == len(data_of(path.read_text())["figures"])
    assert AXES["seconds"] in re.findall(r'<text class="xtitle"[^>]*>(.*?)</text>', done.stdout)
