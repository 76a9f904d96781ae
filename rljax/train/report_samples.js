// Completions: those of a step, or of all steps, that pass the filter; of a prompt below one another or side by side.

const SORTS = { sampled: "as sampled", best: "best first", worst: "worst first" };
const LAYOUTS = { list: "below one another", side: "side by side" };
const STATES = { any: "any", ended: "ended", cut: "truncated", failed: "not scored" };
const DRAWN_AT_ONCE = 48; // completions; a button draws the next ones
const UNFILTERED = { everywhere: false, state: "any", score: "", least: null, most: null, shortest: null, longest: null, text: "" };

const view = { at: 0, sort: "sampled", layout: "list", open: null, color: null, drawn: DRAWN_AT_ONCE, filter: { ...UNFILTERED } };
const plural = (count, word) => `${count.toLocaleString("en-US")} ${word}${count === 1 ? "" : "s"}`;

function drawCompletions() {
  const all = DATA.samples.steps;
  if (!all.length) { $("samples").append(empty("No completions have been sampled yet.")); return; }
  all.forEach((each, at) => { each.groups = groupsOf(each.records, at); });
  view.at = all.length - 1;
  readHash();
  $("samples").append(makeBar(all), makeFilter(all), el("div", { id: "groups" }));
  drawStep();
  window.addEventListener("hashchange", () => { if (readHash()) { drawStep(); showOpen(); } });
  showOpen();
}

function choose(title, options, chosen, onchange) {
  const select = el("select", { onchange: (event) => onchange(event.target.value) },
    ...Object.entries(options).map(([key, text]) => el("option", { value: key, ...(key === chosen ? { selected: "" } : {}) }, text)));
  return el("label", {}, el("span", { class: "soft" }, title), select);
}

function makeBar(all) {
  const go = (at) => { view.at = Math.max(0, Math.min(all.length - 1, at)); view.open = null; redraw(); writeHash(); };
  const move = (id, title, by, sign) => el("button", { id, "aria-label": title, onclick: () => go(view.at + by) }, sign);
  const slider = el("input", {
    id: "slider", type: "range", min: 0, max: all.length - 1, "aria-label": "sampled step", oninput: (event) => go(+event.target.value),
  });
  const steps = el("div", { class: "steps" },
    move("before", "step before", -1, "\u2039"), slider, move("after", "step after", 1, "\u203a"), el("output", { id: "step" }));
  const sort = choose("order", SORTS, view.sort, (key) => { view.sort = key; redraw(); });
  const layout = choose("completions", LAYOUTS, view.layout, (key) => { view.layout = key; redraw(); });
  return el("div", { class: "bar" }, steps, el("span", { class: "hint", id: "counts" }), sort, layout);
}

// ----------------------------------------------------------------------------------------------------------- filter

function makeFilter(all) {
  const set = (name, value) => { view.filter[name] = value; view.open = null; redraw(); };
  const limit = (name, title) => el("input", {
    type: "number", step: "any", "aria-label": title, placeholder: name in { least: 0, shortest: 0 } ? "from" : "to", "data-limit": name,
    oninput: (event) => set(name, event.target.value === "" || Number.isNaN(+event.target.value) ? null : +event.target.value),
  });
  const names = new Set(all.flatMap(({ records }) => records.flatMap((record) => Object.keys(record.scores))));
  const scores = { "": "reward", ...Object.fromEntries([...names].map((name) => [`=${name}`, name])) };
  const score = el("select", { "aria-label": "which reward", "data-filter": "score", onchange: (event) => set("score", event.target.value) },
    ...Object.entries(scores).map(([key, text]) => el("option", { value: key }, text)));
  const text = el("input", { type: "search", "aria-label": "text in prompt or completion", placeholder: "text in prompt or completion",
    oninput: (event) => set("text", event.target.value) });
  const everywhere = el("input", { type: "checkbox", onchange: (event) => set("everywhere", event.target.checked) });
  const state = choose("status", STATES, "any", (key) => set("state", key));
  const form = el("form", { class: "filter", "aria-label": "filter of completions", onsubmit: (event) => event.preventDefault() },
    el("label", { class: "check" }, everywhere, "all sampled steps"), state,
    el("span", { class: "between" }, score, limit("least", "reward from"), limit("most", "reward to")),
    el("span", { class: "between" }, el("span", { class: "soft" }, "tokens"), limit("shortest", "tokens from"), limit("longest", "tokens to")),
    text, el("button", { type: "reset", id: "reset" }, "show all"), el("output", { id: "found" }));
  form.addEventListener("reset", () => { view.filter = { ...UNFILTERED }; view.open = null; redraw(); });
  return form;
}

const STATE_TESTS = {
  any: () => true, ended: (record) => record.ended === true, cut: (record) => record.ended === false, failed: (record) => record.reward === null,
};

function textOf(record) {
  if (record.lower === undefined) {
    const said = record.turns ? record.turns.map((turn) => turn.text).join("\n") : record.completion;
    record.lower = `${record.prompt}\n${said}`.toLowerCase();
  }
  return record.lower;
}

function passing(records) {
  // A limit leaves out what has no such score; the score is the reward, or that of one verifier ("=NAME").
  const { state, score, least, most, shortest, longest } = view.filter, text = view.filter.text.toLowerCase();
  const test = STATE_TESTS[state];
  const scored = least !== null || most !== null;
  return records.filter((record) => {
    if (!test(record)) return false;
    if (scored) {
      const value = score === "" ? record.reward : record.scores[score.slice(1)];
      if (value === null || value === undefined || (least !== null && value < least) || (most !== null && value > most)) return false;
    }
    if ((shortest !== null && record.length < shortest) || (longest !== null && record.length > longest)) return false;
    return text === "" || textOf(record).includes(text);
  });
}

// ------------------------------------------------------------------------------------------------------------- drawing

function redraw() {
  view.drawn = DRAWN_AT_ONCE;
  drawStep();
}

function drawStep() {
  const all = DATA.samples.steps, { step, groups_left_out: left } = all[view.at], { everywhere } = view.filter;
  $("slider").value = view.at;
  $("step").textContent = everywhere ? "all steps" : `step ${step.toLocaleString("en-US")}`;
  $("slider").disabled = everywhere; $("before").disabled = everywhere || view.at === 0; $("after").disabled = everywhere || view.at === all.length - 1;
  $("counts").textContent = everywhere ? plural(all.length, "sampled step")
    : `${view.at + 1} of ${plural(all.length, "sampled step")}` + (left ? `, ${plural(left, "prompt")} left out` : "");
  const looked = everywhere ? all : [all[view.at]];
  const total = looked.reduce((sum, each) => sum + each.records.length, 0);
  const groups = looked.flatMap((each) => passingGroups(each.groups)), count = groups.reduce((sum, group) => sum + group.shown.length, 0);
  $("found").textContent = `${count.toLocaleString("en-US")} of ${plural(total, "completion")}`;
  let drawn = 0;
  const shown = groups.filter((group) => { const fits = drawn < view.drawn; drawn += fits ? group.shown.length : 0; return fits; });
  const scales = view.open === null ? null : scalesOf(all[view.open.at].records);
  const parts = shown.map((group) => drawGroup(group, scales));
  if (!count) parts.push(empty("No completion passes the filter."));
  if (drawn < count) parts.push(el("button", { class: "more", onclick: () => { view.drawn += DRAWN_AT_ONCE; drawStep(); } }, `show more: ${plural(count - drawn, "completion")}`));
  $("groups").replaceChildren(...parts);
  $("tip").hidden = true;
}

function groupsOf(records, at) {
  // The groups of the step that is the at-th; every record is told its place.
  const groups = new Map();
  records.forEach((record, index) => {
    Object.assign(record, { at, index });
    if (!groups.has(record.group)) groups.set(record.group, { records: [], number: groups.size + 1 });
    groups.get(record.group).records.push(record);
  });
  return [...groups.values()].map((group) => ({ ...group, count: groups.size }));
}

function passingGroups(groups) {
  return groups.map((group) => ({ ...group, shown: passing(group.records) })).filter((group) => group.shown.length);
}

function sorted(group) {
  if (view.sort === "sampled") return group;
  const sign = view.sort === "best" ? -1 : 1;
  return [...group].sort((a, b) => (a.reward === null) - (b.reward === null) || sign * (a.reward - b.reward));
}

function meanScores(records) {
  // Means of the verifiers where there are several: the parts of the reward.
  const names = Object.keys(records[0].scores);
  if (names.length < 2) return [];
  return names.flatMap((name) => {
    const known = records.map((record) => record.scores[name]).filter((score) => score !== null && score !== undefined);
    return known.length ? [`${name} ${short(known.reduce((sum, score) => sum + score, 0) / known.length)}`] : [];
  });
}

function drawGroup({ records, shown, number, count }, scales) {
  const scored = records.map((record) => record.reward).filter((reward) => reward !== null);
  const mean = scored.reduce((sum, reward) => sum + reward, 0) / scored.length;
  const far = Math.max(...scored.map((reward) => Math.abs(reward - mean)));
  const facts = view.filter.everywhere ? [`step ${DATA.samples.steps[records[0].at].step.toLocaleString("en-US")}`] : [];
  facts.push(`prompt ${number} of ${count}`);
  facts.push(shown.length < records.length ? `${shown.length} of ${plural(records.length, "completion")}` : plural(records.length, "completion"));
  if (scored.length) facts.push(`mean reward ${short(mean)}`, ...meanScores(records));
  if (scored.length < records.length) facts.push(`${records.length - scored.length} not scored`);
  const others = Object.entries(records[0].columns || {}).filter(([, value]) => value !== records[0].prompt);
  const columns = others.map(([name, value]) => el("span", {}, name + " ", el("b", {}, value)));
  const header = el("header", {}, el("p", { class: "meta" }, ...facts.map((fact) => el("span", {}, fact))),
    el("div", { class: "prompt", tabindex: 0, role: "group", "aria-label": "prompt" }, records[0].prompt || "(no prompt)"),
    columns.length ? el("p", { class: "columns" }, ...columns) : null);
  const side = view.layout === "side", open = shown.find(isOpen);
  const items = sorted(shown).map((record) => drawCompletion(record, mean, far, side ? null : scales));
  const list = el("ol", side ? { class: "completions side", tabindex: 0, "aria-label": "completions side by side" } : { class: "completions" }, ...items);
  return el("article", { class: "group" }, header, list, side && open ? drawTokens(open, scales) : null);
}

function tint(share) {
  const [name, size] = share < 0 ? ["--neg", -share] : ["--pos", share];
  return `rgb(var(${name}) / calc(var(--deepest) * ${Math.min(1, size).toFixed(3)}))`;
}

function drawReward(reward, mean, far) {
  if (reward === null) return el("span", { class: "reward unscored" }, "not scored");
  const box = el("span", { class: "reward" }, short(reward));
  if (far > 1e-6 * Math.max(1, Math.abs(mean))) box.style.background = tint(0.7 * (reward - mean) / far);
  return box;
}

function drawFacts(record) {
  const scores = Object.entries(record.scores).map(([name, score]) =>
    el("span", {}, name + " ", el("b", {}, score === null ? "not scored" : short(score))));
  const turns = record.turns ? el("i", {}, plural(record.turns.filter((turn) => turn.policy).length, "turn")) : null;
  const end = record.ended ? el("i", {}, "ended") : el("i", { class: "cut" }, "truncated");
  return el("div", { class: "facts" }, ...scores, turns, el("i", {}, plural(record.length, "token")), record.ended === null ? null : end);
}

const isOpen = ({ at, index }) => view.open !== null && view.open.at === at && view.open.index === index;

function drawCompletion(record, mean, far, scales) {
  // scales: of the colors of tokens, which are drawn below it when it is open; null where they are drawn elsewhere.
  const open = isOpen(record), name = `${record.at}-${record.index}`;
  const toggle = () => {
    view.open = open ? null : { at: record.at, index: record.index };
    drawStep();
    writeHash();
    document.querySelector(`[data-completion="${name}"]`).focus({ preventScroll: true });
  };
  const line = el("div", {
    class: "line", role: "button", tabindex: 0, "data-completion": name, "aria-expanded": open,
    onclick: () => { if (!String(getSelection())) toggle(); },
    onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle(); } },
  });
  const said = record.turns ? record.turns.map((turn) => el("span", { class: turn.policy ? "" : "seen" }, turn.text)) : [record.completion || "(nothing)"];
  const text = el("div", { class: open && scales ? "text faint once" : "text clamp" }, ...said);
  line.append(drawReward(record.reward, mean, far), text, drawFacts(record));
  return el("li", open ? { class: "open", id: "open" } : {}, line, open && scales ? drawTokens(record, scales) : null);
}

// ----------------------------------------------------------------------------------- address: #step=120&completion=3&color=logp

function readHash() {
  const wish = new URLSearchParams(location.hash.slice(1));
  if (!wish.has("step")) return false;
  const step = Number(wish.get("step"));
  if (!Number.isFinite(step)) return false;
  view.at = nearest(DATA.samples.steps.map((each) => each.step), step); // that very step may have been left out
  const isThere = wish.has("completion") && DATA.samples.steps[view.at].step === step;
  view.open = isThere ? { at: view.at, index: Number(wish.get("completion")) } : null;
  view.color = wish.get("color") || view.color;
  return true;
}

function writeHash() {
  const at = view.open === null ? view.at : view.open.at, parts = [`step=${DATA.samples.steps[at].step}`];
  if (view.open !== null) parts.push(`completion=${view.open.index}`, `color=${encodeURIComponent(view.color)}`);
  history.replaceState(null, "", "#" + parts.join("&"));
}

function showOpen() {
  const open = $("open");
  if (open) requestAnimationFrame(() => open.scrollIntoView({ block: "center" }));
}
