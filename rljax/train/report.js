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
  if (size >= 1e9) return minus((x / 1e9).toPrecision(3) + "G");
  if (size >= 1e6) return minus((x / 1e6).toPrecision(3) + "M");
  if (size >= 1000) return minus(Math.round(x).toLocaleString("en-US"));
  if (size > 0 && size < 1e-3) return minus(x.toExponential(1).replace(".0e", "e"));
  return minus(String(Number(x.toPrecision(3))));
}

function niceTicks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough * 0.999);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(k * step);
  return ticks.length < 2 && count < 9 ? niceTicks(low, high, count + 1) : { step, ticks };
}

function tickLabel(x, step) {
  if (Math.abs(x) < step * 1e-6) return "0";
  if (step >= 1e8) return minus(Number((x / 1e9).toPrecision(4)) + "G");
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

