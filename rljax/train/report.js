"use strict";
// Draws the report from the JSON in #data. What a model wrote is hostile: text enters the page through textContent only.

const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const SVG = $("svg").namespaceURI;
function svg(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// ------------------------------------------------------------------------------------------------------- numbers

const MINUS = "\u2212", DASH = "\u2013";
const minus = (text) => text.replace("-", MINUS);

function short(x) {
  if (x === null || x === undefined) return DASH;
  const size = Math.abs(x);
  if (size >= 1e6) return minus((x / 1e6).toPrecision(3) + "M");
  if (size >= 1000) return minus(Math.round(x).toLocaleString("en-US"));
  if (size > 0 && size < 1e-3) return minus(x.toExponential(1).replace(".0e", "e"));
  return minus(String(Number(x.toPrecision(3))));
}
const signed = (x) => (x > 0 ? "+" : "") + short(x);

function niceTicks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough * 0.999);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(k * step);
  return ticks.length < 2 && count < 9 ? niceTicks(low, high, count + 1) : { step, ticks };
}

function tickLabel(x, step) {
  if (Math.abs(x) < step * 1e-6) return "0";
  if (step >= 1e6) return minus(x / 1e6 + "M");
  if (step >= 1000) return minus(x / 1000 + "k");
  if (step < 1e-3 && Math.abs(x) < 0.1) return minus(Number(x.toPrecision(3)).toExponential());
  return minus(x.toFixed(Math.max(0, -Math.floor(Math.log10(step) + 1e-9))));
}

// ------------------------------------------------------------------------------------------------- title, headline

function drawTitle() {
  const t = DATA.title;
  const facts = [t.total === null ? `${t.steps} steps` : `${t.steps} of ${t.total} steps`];
  facts.push(...Object.entries(t.facts).map(([name, value]) => `${name} ${value}`));
  if (t.written) facts.push(`last written ${t.written}`);
  const meta = el("p", { class: "meta" }, ...facts.map((fact) => el("span", {}, fact)));
  $("title").append(t.experiment ? el("p", { class: "meta" }, t.experiment) : "", el("h1", {}, t.run), meta);
  if (!DATA.headline.length) return;
  const cells = DATA.headline.map((h) => el("div", { title: h.name }, el("dt", {}, h.name), el("dd", { class: "number" },
    el("span", { class: "from" }, short(h.first) + " \u2192"), el("span", { class: "to" }, short(h.last)))));
  const width = Math.max(...DATA.headline.map((h) => h.window));
  const note = width > 1 ? `Means of the first and of the last ${width} values logged; single values where few were.`
    : "The first and the last value logged.";
  $("title").append(el("dl", { class: "headline" }, ...cells), el("p", { class: "note" }, note));
}

// --------------------------------------------------------------------------------------------------------- curves

const charts = [];

function drawCurves() {
  if (!DATA.curves.length) $("charts").append(el("p", { class: "empty" }, "No metrics have been written yet."));
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

function makeChart(series) {
  const value = el("span", { class: "value" });
  const caption = el("figcaption", {}, el("span", { class: "name", title: series.name }, series.name), value);
  const canvas = svg("svg", { role: "img", "aria-label": `${series.name} by step` });
  const chart = { series, value, canvas };
  chart.draw = () => drawChart(chart);
  chart.point = (step) => pointAt(chart, step);
  canvas.addEventListener("pointermove", (event) => {
    if (!chart.stepAt) return; // nothing finite, nothing drawn
    const step = chart.stepAt(event.clientX - canvas.getBoundingClientRect().left);
    charts.forEach((other) => other.point(step));
  });
  canvas.addEventListener("pointerleave", () => charts.forEach((other) => other.point(null)));
  charts.push(chart);
  return el("figure", { class: "chart" }, caption, canvas);
}

function range(values) {
  let low = Math.min(...values), high = Math.max(...values);
  if (low === high) { const pad = Math.abs(low) * 0.1 || 0.5; low -= pad; high += pad; }
  const pad = (high - low) * 0.05;
  return [low >= 0 && low - pad < 0 ? 0 : low - pad, high <= 0 && high + pad > 0 ? 0 : high + pad];
}

function drawChart(chart) {
  const { series, canvas } = chart, W = canvas.clientWidth, H = canvas.clientHeight;
  canvas.replaceChildren();
  if (!series.values.length || !W) { pointAt(chart, null); return; }
  const [low, high] = range(series.values), { step, ticks } = niceTicks(low, high, 4);
  const labels = ticks.map((y) => tickLabel(y, step));
  const left = 8 + 6.1 * Math.max(...labels.map((label) => label.length)), right = 6, top = 7, bottom = 19;
  const [first, last] = DATA.steps, span = last - first || 1;
  const x = (s) => left + (s - first) / span * (W - left - right);
  const y = (v) => top + (high - v) / (high - low) * (H - top - bottom);
  Object.assign(chart, { x, y, stepAt: (px) => first + (px - left) / (W - left - right) * span, base: H - bottom });
  ticks.forEach((v, i) => canvas.append(
    svg("line", { class: "grid", x1: left, x2: W - right, y1: y(v), y2: y(v) }),
    svg("text", { x: left - 5, y: y(v) + 3.5, "text-anchor": "end" }, labels[i])));
  const along = niceTicks(first, last === first ? first + 1 : last, W < 170 ? 2 : W < 260 ? 3 : 5);
  for (const s of along.ticks.filter(Number.isInteger))
    canvas.append(svg("text", { x: x(s), y: H - 4, "text-anchor": x(s) > W - 22 ? "end" : "middle" }, tickLabel(s, along.step)));
  drawLines(chart);
  chart.mark = svg("g", { visibility: "hidden" });
  chart.mark.append(svg("line", { class: "cross", y1: top, y2: H - bottom }), svg("text", { class: "here", y: H - 4 }),
    svg("circle", { class: "pin", r: 3.4 }));
  canvas.append(chart.mark, svg("rect", { x: 0, y: 0, width: W, height: H, fill: "transparent" }));
  pointAt(chart, null);
}

function drawLines({ series, canvas, x, y, base }) {
  const path = (steps, values) => "M" + steps.map((s, i) => `${x(s).toFixed(1)} ${y(values[i]).toFixed(1)}`).join("L");
  const [steps, values] = series.smooth;
  canvas.append(svg("path", { class: steps.length ? "raw under" : "raw", d: path(series.steps, series.values) }));
  if (steps.length) canvas.append(svg("path", { class: "smooth", d: path(steps, values) }));
  else series.steps.forEach((s, i) => canvas.append(svg("circle", { class: "dot", cx: x(s), cy: y(series.values[i]), r: 2.2 })));
  for (const s of series.nulls) canvas.append(svg("rect", { class: "null", x: x(s) - 1, y: base - 2, width: 2, height: 6 }));
}

function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (steps[middle] < step) low = middle; else high = middle; }
  return step - steps[low] < steps[high] - step ? low : high;
}

function pointAt(chart, step) {
  const { series, value, mark } = chart;
  const why = `not finite at ${series.missing} steps, marked below`;
  const nulls = series.missing ? el("span", { class: "nulls", title: why }, `${series.missing} null `) : null;
  if (step === null || !series.values.length) {
    value.replaceChildren(...[nulls, el("b", {}, short(series.last))].filter(Boolean));
    if (mark) mark.setAttribute("visibility", "hidden");
    return;
  }
  const i = nearest(series.steps, step), at = { cx: chart.x(series.steps[i]), cy: chart.y(series.values[i]) };
  value.replaceChildren(el("b", {}, short(series.values[i])));
  mark.setAttribute("visibility", "visible");
  const [line, here, pin] = mark.children;
  const put = (node, values) => Object.entries(values).forEach(([name, x]) => node.setAttribute(name, x));
  put(line, { x1: at.cx, x2: at.cx });
  put(pin, at);
  here.textContent = series.steps[i].toLocaleString("en-US");
  put(here, { x: at.cx, "text-anchor": at.cx > chart.x(DATA.steps[1]) - 16 ? "end" : "middle" });
}

// -------------------------------------------------------------------------------------------------------- completions

const SORTS = { sampled: "as sampled", best: "best first", worst: "worst first" };
const NAMES = { advantage: "advantage", log_ratio: "log-ratio", logp: "log-prob", mask: "mask" };
const view = { at: 0, sort: "sampled", completion: null, color: null };

function drawCompletions() {
  const all = DATA.samples.steps;
  if (!all.length) { $("samples").append(el("p", { class: "empty" }, "No completions have been sampled yet.")); return; }
  view.at = all.length - 1;
  readHash();
  const go = (at) => { view.at = Math.max(0, Math.min(all.length - 1, at)); view.completion = null; drawStep(); writeHash(); };
  const move = (id, title, by, sign) => el("button", { id, "aria-label": title, onclick: () => go(view.at + by) }, sign);
  const slider = el("input", {
    id: "slider", type: "range", min: 0, max: all.length - 1, "aria-label": "sampled step", oninput: (event) => go(+event.target.value),
  });
  const sort = el("select", { "aria-label": "order of completions", onchange: (event) => { view.sort = event.target.value; drawStep(); } },
    ...Object.entries(SORTS).map(([key, title]) => el("option", { value: key }, title)));
  const steps = el("div", { class: "steps" },
    move("before", "step before", -1, "\u2039"), slider, move("after", "step after", 1, "\u203a"), el("output", { id: "step" }));
  const order = el("label", {}, el("span", { class: "soft" }, "completions "), sort);
  const bar = el("div", { class: "bar" }, steps, el("span", { class: "hint", id: "counts" }), order);
  $("samples").append(bar, el("div", { id: "groups" }));
  drawStep();
  window.addEventListener("hashchange", () => { if (readHash()) { drawStep(); showOpen(); } });
  showOpen();
}

function drawStep() {
  const all = DATA.samples.steps, { step, records, groups_left_out: left } = all[view.at];
  $("slider").value = view.at;
  $("step").textContent = `step ${step.toLocaleString("en-US")}`;
  $("before").disabled = view.at === 0; $("after").disabled = view.at === all.length - 1;
  $("counts").textContent = `${view.at + 1} of ${all.length} sampled steps` + (left ? `, ${left} prompts left out` : "");
  const groups = new Map();
  records.forEach((record, index) => {
    if (!groups.has(record.group)) groups.set(record.group, []);
    groups.get(record.group).push({ ...record, index });
  });
  const scales = scalesOf(records);
  $("groups").replaceChildren(...[...groups.values()].map((group, i) => drawGroup(group, i, groups.size, scales)));
  $("tip").hidden = true;
}

function sorted(group) {
  if (view.sort === "sampled") return group;
  const sign = view.sort === "best" ? -1 : 1;
  return [...group].sort((a, b) => (a.reward === null) - (b.reward === null) || sign * (a.reward - b.reward));
}

function drawGroup(group, i, count, scales) {
  const scored = group.map((record) => record.reward).filter((reward) => reward !== null);
  const mean = scored.reduce((sum, reward) => sum + reward, 0) / scored.length;
  const far = Math.max(...scored.map((reward) => Math.abs(reward - mean)));
  const facts = [`prompt ${i + 1} of ${count}`, group.length === 1 ? "1 completion" : `${group.length} completions`];
  if (scored.length) facts.push(`mean reward ${short(mean)}`);
  if (scored.length < group.length) facts.push(`${group.length - scored.length} not scored`);
  const columns = Object.entries(group[0].columns || {}).map(([name, value]) => el("span", {}, name + " ", el("b", {}, value)));
  const header = el("header", {}, el("p", { class: "meta" }, ...facts.map((fact) => el("span", {}, fact))),
    el("div", { class: "prompt" }, group[0].prompt), columns.length ? el("p", { class: "columns" }, ...columns) : null);
  const completions = sorted(group).map((record) => drawCompletion(record, mean, far, scales));
  return el("article", { class: "group" }, header, el("ol", { class: "completions" }, ...completions));
}

function tint(share) {
  const [name, size] = share < 0 ? ["--neg", -share] : ["--pos", share];
  return `rgb(var(${name}) / ${(0.78 * Math.min(1, size)).toFixed(3)})`;
}

function drawReward(reward, mean, far) {
  if (reward === null) return el("span", { class: "reward unscored" }, "not scored");
  const box = el("span", { class: "reward" }, short(reward));
  if (far > 1e-6 * Math.max(1, Math.abs(mean))) box.style.background = tint(0.7 * (reward - mean) / far);
  return box;
}

function drawFacts(record) {
  const scores = Object.entries(record.scores).map(([name, score]) =>
    el("span", {}, name + " ", el("b", {}, score === null ? "not scored" : short(score)), " \u00b7 "));
  const turns = record.turns ? `${record.turns.filter((turn) => turn.policy).length} turns \u00b7 ` : "";
  const length = el("i", {}, `${turns}${record.length} ${record.length === 1 ? "token" : "tokens"}`);
  const end = record.ended ? el("i", {}, " \u00b7 ended") : el("i", { class: "cut" }, " \u00b7 cut off");
  return el("div", { class: "facts" }, ...scores, length, record.ended === null ? null : end);
}

function drawCompletion(record, mean, far, scales) {
  const open = view.completion === record.index;
  const toggle = () => {
    view.completion = open ? null : record.index;
    drawStep();
    writeHash();
    document.querySelector(`[data-completion="${record.index}"]`).focus({ preventScroll: true });
  };
  const line = el("div", {
    class: "line", role: "button", tabindex: 0, "data-completion": record.index, "aria-expanded": open,
    onclick: () => { if (!String(getSelection())) toggle(); },
    onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle(); } },
  });
  const said = record.turns ? record.turns.map((turn) => el("span", { class: turn.policy ? "" : "seen" }, turn.text)) : [record.completion || "(nothing)"];
  const text = el("div", { class: open ? "text faint once" : "text clamp" }, ...said);
  line.append(drawReward(record.reward, mean, far), text, drawFacts(record));
  return el("li", open ? { class: "open", id: "open" } : {}, line, open ? drawTokens(record, scales) : null);
}

// --------------------------------------------------------------------------------------------------------- tokens

const rank = (name) => (name in NAMES ? Object.keys(NAMES).indexOf(name) : 99);
const quantities = (record) => Object.keys(record.tokens)
  .filter((name) => !["id", "text", "chosen"].includes(name)).sort((a, b) => rank(a) - rank(b));
const label = (name) => NAMES[name] || name;

function scalesOf(records) {
  // One scale for all completions of a step, so that their colors compare; the 98th percentile, so that one token does not pale the rest.
  const scales = {};
  for (const name of new Set(records.flatMap(quantities))) {
    const sizes = records.flatMap((r) => r.tokens[name] || []).filter((v) => v !== null).map(Math.abs).sort((a, b) => a - b);
    scales[name] = sizes[Math.floor(0.98 * (sizes.length - 1))] || sizes[sizes.length - 1] || 1;
  }
  return scales;
}

function drawTokens(record, scales) {
  const names = quantities(record), box = el("div", { class: "tokens" });
  const chosen = names.includes(view.color) ? view.color : names.includes("advantage") ? "advantage" : names[0];
  const flow = el("div", { class: "flow" }, ...record.tokens.text.map((text, i) => drawToken(record.tokens, text, i)));
  const show = (name) => {
    view.color = name;
    buttons.forEach((button) => button.setAttribute("aria-pressed", button.dataset.name === name));
    legend.replaceChildren(...legendOf(name, scales[name]));
    [...flow.children].forEach((span, i) => { span.style.background = colorOf(record.tokens, name, i, scales[name]); });
  };
  const buttons = names.map((name) => el("button", { "data-name": name, onclick: () => { show(name); writeHash(); } }, label(name)));
  const legend = el("div", { class: "legend" });
  flow.addEventListener("pointerover", (event) => showTip(event, flow, record.tokens));
  flow.addEventListener("click", (event) => showTip(event, flow, record.tokens));
  flow.addEventListener("pointerleave", hideTip);
  if (record.turns) box.append(drawTurns(record.turns));
  box.append(el("div", { class: "tools" }, el("div", { class: "choice" }, ...buttons), legend), flow);
  show(chosen);
  return box;
}

function drawTurns(turns) {
  // What the policy wrote, turn by turn with its reward, and set apart from it what it was answered.
  let number = 0;
  const parts = turns.map((turn) => {
    const size = `${turn.end - turn.start} ${turn.end - turn.start === 1 ? "token" : "tokens"}`;
    const facts = [turn.policy ? `turn ${++number}` : "observation", size];
    if (turn.policy) facts.push(turn.reward === null ? "no reward" : `reward ${short(turn.reward)}`);
    if (turn.notes) facts.push(turn.notes);
    return el("li", { class: turn.policy ? "turn" : "turn seen" },
      el("p", { class: "meta" }, ...facts.map((fact) => el("span", {}, fact))), el("div", { class: "text" }, turn.text || "(no text)"));
  });
  return el("ol", { class: "turns" }, ...parts);
}

function legendOf(name, scale) {
  const others = el("span", { class: "faint" }, "grey: not the policy's");
  if (name !== "mask") return [minus(`-${short(scale)}`), el("span", { class: "scale" }), `+${short(scale)}`, others];
  const keys = [[0.6, "learned from"], [-0.6, "left out"]].flatMap(([share, text]) => {
    const box = el("span", { class: "key" });
    box.style.background = tint(share);
    return [box, el("span", {}, text)];
  });
  return [...keys, others];
}

function colorOf(tokens, name, i, scale) {
  if (!tokens.chosen[i]) return "";
  if (name === "mask") return tint(tokens.mask[i] ? 0.6 : -0.6);
  return tokens[name][i] === null ? "" : tint(tokens[name][i] / scale);
}

const INVISIBLE = new RegExp("[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u00a0\\u00ad\\u061c\\u115f\\u1160\\u180e" +
  "\\u2000-\\u200f\\u2028-\\u202f\\u205f-\\u206f\\u3000\\u3164\\ufe00-\\ufe0f\\ufeff\\ufff0-\\ufffb]");

function visible(text) {
  // The text with its spaces, line ends and invisible characters drawn; real spaces stay, so that lines break where they would.
  const parts = [];
  for (const c of text) {
    if (c === " ") parts.push(el("i", { class: "sp" }, " "));
    else if (c === "\n") parts.push(el("i", {}, "\u21b5"), "\n");
    else if (c === "\t") parts.push(el("i", {}, "\u21e5"), "\t");
    else if (INVISIBLE.test(c)) parts.push(el("i", { class: "odd" }, "U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")));
    else if (typeof parts[parts.length - 1] === "string" && parts[parts.length - 1] !== "\n") parts[parts.length - 1] += c;
    else parts.push(c);
  }
  return parts;
}

function drawToken(tokens, text, i) {
  const kind = !tokens.chosen[i] ? "given" : tokens.mask && !tokens.mask[i] ? "dropped" : "";
  return el("span", { class: kind }, ...(text === "" ? [el("i", { class: "odd" }, `\u27e8${tokens.id[i]}\u27e9`)] : visible(text)));
}

function showTip(event, flow, tokens) {
  const span = event.target.closest(".flow > span");
  if (!span) return;
  const i = [...flow.children].indexOf(span), tip = $("tip");
  const rows = [["token", `${i + 1} of ${flow.children.length}`], ["id", String(tokens.id[i])]];
  for (const name of quantities({ tokens }).filter((key) => key !== "mask")) {
    const x = tokens[name][i];
    if (x !== null) rows.push([label(name), signed(x)]);
    if (x !== null && name === "logp") rows.push(["probability", short(Math.exp(x))]);
    if (x !== null && name === "log_ratio") rows.push(["ratio", short(Math.exp(x))]);
  }
  rows.push(["mask", !tokens.chosen[i] ? "not the policy's" : tokens.mask && !tokens.mask[i] ? "left out" : "learned from"]);
  tip.replaceChildren(el("div", { class: "what" }, tokens.text[i] === "" ? "(no text)" : JSON.stringify(tokens.text[i])),
    el("dl", {}, ...rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])));
  flow.querySelectorAll(".at").forEach((other) => other.classList.remove("at"));
  span.classList.add("at");
  placeTip(tip, span.getClientRects()[0]);
}

function placeTip(tip, box) {
  tip.hidden = false;
  const { offsetWidth: w, offsetHeight: h } = tip;
  tip.style.left = Math.max(8, Math.min(box.left, innerWidth - w - 8)) + "px";
  tip.style.top = (box.bottom + h + 12 < innerHeight ? box.bottom + 6 : Math.max(8, box.top - h - 6)) + "px";
}

function hideTip() {
  $("tip").hidden = true;
  document.querySelectorAll(".at").forEach((span) => span.classList.remove("at"));
}

// ----------------------------------------------------------------------------------- address: #step=120&completion=3&color=logp

function readHash() {
  const wish = new URLSearchParams(location.hash.slice(1));
  if (!wish.has("step")) return false;
  const step = Number(wish.get("step"));
  if (!Number.isFinite(step)) return false;
  view.at = nearest(DATA.samples.steps.map((each) => each.step), step); // that very step may have been left out
  view.completion = wish.has("completion") && DATA.samples.steps[view.at].step === step ? Number(wish.get("completion")) : null;
  view.color = wish.get("color") || view.color;
  return true;
}

function writeHash() {
  const parts = [`step=${DATA.samples.steps[view.at].step}`];
  if (view.completion !== null) parts.push(`completion=${view.completion}`, `color=${encodeURIComponent(view.color)}`);
  history.replaceState(null, "", "#" + parts.join("&"));
}

function showOpen() {
  const open = $("open");
  if (open) requestAnimationFrame(() => open.scrollIntoView({ block: "center" }));
}

// -------------------------------------------------------------------------------------------------- configuration

function drawConfig() {
  if (!DATA.config.length) $("config").replaceWith(el("p", { class: "empty" }, "No configuration was saved."));
  else $("config").append(...DATA.config.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  const { samples, thinned } = DATA, notes = [];
  const all = samples.left_out + samples.steps.length;
  if (samples.left_out) notes.push(`${samples.left_out} of ${all} sampled steps were left out of this page; samples.jsonl has them all.`);
  if (thinned) notes.push(`Curves of more than ${thinned} points are thinned; every peak and trough stands.`);
  $("footer").textContent = notes.join(" ");
}

document.addEventListener("scroll", hideTip, { passive: true });
drawTitle();
drawCurves();
drawConfig();
drawCompletions();
