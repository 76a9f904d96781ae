// Curves: one chart a metric, of one line for a run, or of a line with its interval for each group of runs.

const charts = [];
const linesOf = (series) => series.lines || [series];

function drawCurves() {
  if (!DATA.curves.length) $("charts").append(el("p", { class: "empty" }, "No metrics have been written yet."));
  if (DATA.groups) $("charts").append(el("p", { class: "lines" }, ...DATA.groups.map((group, i) => lineName(i))));
  for (const theme of DATA.curves) {
    const grid = el("div", { class: "charts" }, ...theme.series.map(makeChart));
    $("charts").append(el("h3", {}, theme.title), grid);
  }
  let width = $("charts").clientWidth;
  charts.forEach((chart) => chart.draw());
  new ResizeObserver(() => {
    if ($("charts").clientWidth === width) return;
    width = $("charts").clientWidth;
    charts.forEach((chart) => chart.draw());
  }).observe($("charts"));
}

const COLORS = 6; // beyond them lines are dashed
const lineClass = (group) => `c${group % COLORS}${group >= COLORS ? " dashed" : ""}`;

function lineName(group) {
  const sample = svg("svg", { class: "swatch", "aria-hidden": "true", viewBox: "0 0 22 8" });
  sample.append(svg("line", { class: `stroke ${lineClass(group)}`, x1: 1, x2: 21, y1: 4, y2: 4 }));
  return el("span", { class: "line-name" }, sample, el("span", { class: "label" }, DATA.groups[group].label));
}

function makeChart(series) {
  const value = el("span", { class: "value" });
  const caption = el("figcaption", {}, el("span", { class: "name", title: series.name }, series.name), value);
  const canvas = svg("svg", { role: "img", "aria-label": `${series.name} by step` });
  const chart = { series, value, canvas, lines: linesOf(series).filter((line) => line.values.length) };
  chart.draw = () => drawChart(chart);
  chart.point = (step) => pointAt(chart, step);
  canvas.addEventListener("pointermove", (event) => {
    if (!chart.stepAt) return; // nothing finite, nothing drawn
    const step = chart.stepAt(event.clientX - canvas.getBoundingClientRect().left);
    charts.forEach((other) => other.point(step));
    if (DATA.groups) showLines(chart, step);
  });
  canvas.addEventListener("pointerleave", () => { charts.forEach((other) => other.point(null)); hideTip(); });
  charts.push(chart);
  return el("figure", { class: "chart" }, caption, canvas);
}

function range(lines) {
  // Of the values, and of comparisons what their runs reached; an interval may be far wider, and is cut at the edge.
  let low = Infinity, high = -Infinity;
  for (const line of lines) for (const v of line.extent || line.values) { low = Math.min(low, v); high = Math.max(high, v); }
  if (low === 0 && high === 0) return [0, 1];
  if (low === high) { const pad = Math.abs(low) * 0.1 || 0.5; low -= pad; high += pad; }
  const pad = (high - low) * 0.05;
  return [low >= 0 && low - pad < 0 ? 0 : low - pad, high <= 0 && high + pad > 0 ? 0 : high + pad];
}

function drawChart(chart) {
  const { canvas, lines } = chart, W = canvas.clientWidth, H = canvas.clientHeight;
  canvas.replaceChildren();
  if (!lines.length || !W) { pointAt(chart, null); return; }
  const [low, high] = range(lines), { step, ticks } = niceTicks(low, high, 4);
  const labels = ticks.map((y) => tickLabel(y, step));
  const left = 8 + 6.1 * Math.max(...labels.map((label) => label.length)), right = 6, top = 7, bottom = 19;
  const [first, last] = DATA.steps, span = last - first || 1;
  const x = (s) => left + (s - first) / span * (W - left - right);
  const y = (v) => top + (high - v) / (high - low) * (H - top - bottom);
  Object.assign(chart, { x, y, low, high, stepAt: (px) => first + (px - left) / (W - left - right) * span, base: H - bottom });
  ticks.forEach((v, i) => canvas.append(
    svg("line", { class: "grid", x1: left, x2: W - right, y1: y(v), y2: y(v) }),
    svg("text", { x: left - 5, y: y(v) + 3.5, "text-anchor": "end" }, labels[i])));
  const along = niceTicks(first, last === first ? first + 1 : last, W < 170 ? 2 : W < 260 ? 3 : 5);
  for (const s of along.ticks.filter(Number.isInteger))
    canvas.append(svg("text", { x: x(s), y: H - 4, "text-anchor": x(s) > W - 22 ? "end" : "middle" }, tickLabel(s, along.step)));
  lines.forEach((line) => drawBand(chart, line));
  lines.forEach((line) => drawLine(chart, line));
  for (const s of chart.series.nulls || [])
    canvas.append(svg("rect", { class: "null", x: x(s) - 1, y: chart.base - 2, width: 2, height: 6 }));
  chart.mark = svg("g", { visibility: "hidden" });
  chart.mark.append(svg("line", { class: "cross", y1: top, y2: H - bottom }), svg("text", { class: "here", y: H - 4 }),
    svg("circle", { class: "pin", r: 3.4, visibility: DATA.groups ? "hidden" : "inherit" }));
  canvas.append(chart.mark, svg("rect", { x: 0, y: 0, width: W, height: H, fill: "transparent" }));
  pointAt(chart, null);
}

function drawBand({ canvas, x, y, low, high }, line) {
  if (!line.low) return;
  const clipped = (v) => y(Math.max(low, Math.min(high, v))).toFixed(1);
  const upper = line.steps.map((s, i) => `${x(s).toFixed(1)} ${clipped(line.high[i])}`);
  const lower = line.steps.map((s, i) => `${x(s).toFixed(1)} ${clipped(line.low[i])}`).reverse();
  canvas.append(svg("path", { class: `band ${lineClass(line.group)}`, d: `M${[...upper, ...lower].join("L")}Z` }));
}

function drawLine({ canvas, x, y }, line) {
  const path = (steps, values) => "M" + steps.map((s, i) => `${x(s).toFixed(1)} ${y(values[i]).toFixed(1)}`).join("L");
  const [steps, values] = line.smooth || [[], []], few = line.steps.length < 24;
  const color = line.group === undefined ? "c0" : lineClass(line.group);
  canvas.append(svg("path", { class: `${steps.length ? "raw under" : "raw"} ${color}`, d: path(line.steps, line.values) }));
  if (steps.length) canvas.append(svg("path", { class: `smooth ${color}`, d: path(steps, values) }));
  else if (few) line.steps.forEach((s, i) => canvas.append(svg("circle", { class: `dot ${color}`, cx: x(s), cy: y(line.values[i]), r: 2.2 })));
}

function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (steps[middle] < step) low = middle; else high = middle; }
  return step - steps[low] < steps[high] - step ? low : high;
}

function pointAt(chart, step) {
  const { series, lines, value, mark } = chart;
  const why = `not finite at ${series.missing} steps, marked below`;
  const nulls = series.missing ? el("span", { class: "nulls", title: why }, `${series.missing} null `) : null;
  if (step === null || !lines.length) {
    const last = series.last === undefined ? null : el("b", {}, short(series.last));
    value.replaceChildren(...[nulls, last].filter(Boolean));
    if (mark) mark.setAttribute("visibility", "hidden");
    return;
  }
  const line = lines[0], i = nearest(line.steps, step), at = { cx: chart.x(line.steps[i]), cy: chart.y(line.values[i]) };
  if (!DATA.groups) value.replaceChildren(el("b", {}, short(line.values[i])));
  mark.setAttribute("visibility", "visible");
  const [cross, here, pin] = mark.children;
  const put = (node, values) => Object.entries(values).forEach(([name, x]) => node.setAttribute(name, x));
  put(cross, { x1: at.cx, x2: at.cx });
  put(pin, at);
  here.textContent = Math.round(line.steps[i]).toLocaleString("en-US");
  put(here, { x: at.cx, "text-anchor": at.cx > chart.x(DATA.steps[1]) - 16 ? "end" : "middle" });
}

function showLines(chart, step) {
  // What each group of runs has at that step: mean, and interval where several runs have it.
  const rows = chart.lines.filter((line) => step <= line.steps[line.steps.length - 1] + 0.5).flatMap((line) => {
    const i = nearest(line.steps, step);
    const interval = line.low ? ` (${short(line.low[i])} to ${short(line.high[i])})` : "";
    return [el("dt", {}, lineName(line.group)), el("dd", {}, short(line.values[i]) + interval)];
  });
  $("tip").replaceChildren(el("div", { class: "what" }, chart.series.name), el("dl", {}, ...rows));
  placeTip($("tip"), chart.canvas.getBoundingClientRect());
}
