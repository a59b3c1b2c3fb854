"use strict";
// Draws the figures of a report (figures.py) over the axis that the reader has chosen, in the colours of their device.

window.addEventListener("error", (event) => {
  const note = document.getElementById("error");
  note.textContent += `This page is not complete: ${event.message}\n`;
  note.hidden = false;
});

const { axes, figures } = JSON.parse(document.getElementById("data").textContent);
const isDark = matchMedia("(prefers-color-scheme: dark)");
const isNarrow = matchMedia("(max-width: 600px)");
const isTouch = matchMedia("(pointer: coarse)");
const TICKS = { step: ",d", tokens: "~s", flops: "~s", seconds: ",~r" };

function cssColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function shapesOf(stretches, axis) {
  const across = { yref: "paper", y0: 0, y1: 1 };
  const shades = stretches
    .filter((stretch) => stretch.color !== null)
    .map(({ start, end, color }) => ({
      ...across, type: "rect", layer: "below", x0: start[axis], x1: end[axis], fillcolor: color, line: { width: 0 },
    }));
  const switches = stretches.slice(1).map(({ start }) => ({
    ...across, type: "line", x0: start[axis], x1: start[axis], line: { color: cssColor("faint"), width: 1, dash: "dot" },
  }));
  return [...shades, ...switches];
}

function axisOf(own) {
  return {
    gridcolor: cssColor("grid"), linecolor: cssColor("grid"), zerolinecolor: cssColor("grid"), automargin: true,
    ...own, title: { text: own?.title ?? "", standoff: 8 },
  };
}

function layoutOf(figure, axis) {
  const { yaxis, yaxis2, ...rest } = figure.layout;
  const named = figure.traces.filter((trace) => trace.name && trace.showlegend !== false);
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: cssColor("text"), family: "system-ui, sans-serif", size: 12 },
    margin: { l: isNarrow.matches ? 44 : 56, r: 12, t: 8, b: 40 },
    height: isNarrow.matches ? 240 + 18 * named.length : 340, // a narrow legend has a line for each name
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    hovermode: "x unified",
    hoverlabel: { bgcolor: cssColor("panel"), bordercolor: cssColor("grid"), font: { color: cssColor("text") } },
    dragmode: isTouch.matches ? false : "zoom", // a finger that drags wants to scroll the page
    ...rest,
    xaxis: { ...axisOf({ title: axes[axis] }), tickformat: TICKS[axis], zeroline: false },
    yaxis: axisOf(yaxis),
    shapes: shapesOf(figure.stretches, axis),
  };
  if (figure.stretches.length > 0) layout.xaxis.range = [0, figure.stretches.at(-1).end[axis]];
  if (yaxis2) layout.yaxis2 = axisOf(yaxis2);
  return layout;
}

function draw() {
  const axis = document.querySelector("input[name=axis]:checked").value;
  figures.forEach((figure, number) => {
    const traces = figure.traces.map((trace) => ({ ...trace, x: trace.x[axis] }));
    Plotly.react(`figure-${number}`, traces, layoutOf(figure, axis), { responsive: true, displayModeBar: false });
  });
}

document.querySelectorAll("input[name=axis]").forEach((input) => {
  input.checked ||= location.hash === `#${input.value}`; // report.html#seconds opens over seconds
  input.addEventListener("change", draw);
});
[isDark, isNarrow, isTouch].forEach((query) => query.addEventListener("change", draw));
draw();
