// What stands around curves and completions: alarms, tables of time, memory and environment, settings; and the start.

const MANY = ["s", "min", "h"];
function duration(seconds) {
  if (seconds === null) return DASH;
  if (seconds < 120) return `${short(seconds)} ${MANY[0]}`;
  return seconds < 7200 ? `${short(seconds / 60)} ${MANY[1]}` : `${short(seconds / 3600)} ${MANY[2]}`;
}
const percent = (share) => `${short(Math.round(share * 1000) / 10)} %`;
const bytes = (size) => (size >= 1e9 ? `${short(size / 1e9)} GB` : `${short(size / 1e6)} MB`);
const UNITS = { seconds: duration, share: percent, bytes, "": (value) => (typeof value === "number" ? short(value) : value) };
const cell = (unit, value) => (value === null ? DASH : UNITS[unit](value));

function table(name, head, rows) {
  // rows: of cells, each a text or nodes; the first names the row. Wide ones scroll by themselves.
  const line = ([first, ...rest]) => el("tr", {}, el("th", { scope: "row" }, first), ...rest.map((each) => el("td", {}, each)));
  const header = el("thead", {}, el("tr", {}, ...head.map((each) => el("th", { scope: "col" }, each))));
  const inside = el("table", {}, el("caption", {}, name), header, el("tbody", {}, ...rows.map(line)));
  return el("div", { class: "table", role: "region", "aria-label": name, tabindex: 0 }, inside);
}

const facts = (rows) => el("dl", { class: "config" }, ...rows.map(([name, value]) =>
  el("div", {}, el("dt", {}, name), el("dd", {}, value))));
const empty = (text) => el("p", { class: "empty" }, text);

// --------------------------------------------------------------------------------------------------------- alarms

const stateOf = (alarm) => el("span", { class: "state" }, alarm.now ? "at the last step" : "earlier");

function whereOf(alarm) {
  const where = alarm.count === 1 ? `at step ${alarm.first}` : `at ${alarm.count} of ${alarm.total} steps, from ${alarm.first} to ${alarm.last}`;
  return where + (alarm.worst === null || alarm.count === 1 ? "" : `, worst at step ${alarm.worst_step}`) + (alarm.worst === null ? "" : `: ${short(alarm.worst)}`);
}

function describeAlarm(alarms) {
  // One rule, and where it holds: of this run, or of each of the runs that are compared.
  const [alarm] = alarms, rule = [el("code", {}, alarm.metric), ` ${alarm.rule}`];
  const now = alarms.some((each) => each.now);
  const runs = alarms.map((each) => el("li", {}, el("span", { class: "of" }, each.run), ` ${whereOf(each)}`, stateOf(each)));
  return el("li", { class: now ? "alarm now" : "alarm" }, el("b", {}, alarm.title), ...(alarm.run ? [] : [stateOf(alarm)]),
    el("p", {}, ...rule, alarm.run ? "" : ` ${whereOf(alarm)}`, ` \u2013 ${alarm.meaning}.`), alarm.run ? el("ul", {}, ...runs) : null);
}

function byRule(alarms) {
  const rules = new Map();
  for (const alarm of alarms) {
    if (!rules.has(alarm.title)) rules.set(alarm.title, []);
    rules.get(alarm.title).push(alarm);
  }
  return [...rules.values()];
}

function drawAlarms() {
  const found = DATA.alarms.filter((alarm) => alarm.count), rules = DATA.rules || DATA.alarms;
  if (!rules.length) { $("alarms").append(empty("No metrics have been written yet.")); return; }
  if (found.length) $("alarms").append(el("ul", { class: "alarms" }, ...byRule(found).map(describeAlarm)));
  else $("alarms").append(empty("None of the thresholds below was crossed."));
  const state = (rule) => !rule.logged ? "not logged" : rule.count ? `${rule.count} of ${rule.total} steps` : "never";
  const rows = rules.map((rule) => [rule.title, el("code", {}, rule.metric), rule.rule, ...(DATA.rules ? [] : [state(rule)]), rule.meaning]);
  const head = ["alarm", "metric", "threshold", ...(DATA.rules ? [] : ["crossed"]), "meaning"];
  $("alarms").append(el("details", {}, el("summary", {}, `${rules.length} thresholds`), table("Thresholds of the alarms", head, rows)));
}

// ----------------------------------------------------------------------------------------- time, memory, environment

function drawTime() {
  const { time } = DATA;
  if (!time) { $("time").append(empty("No times were logged.")); return; }
  const rows = [["steps", String(time.steps)], ["in all", duration(time.total)], ["a step, median", duration(time.median)],
    ["first step", duration(time.first)]];
  if (time.compiling !== null) rows.push(["of all, compiling", duration(time.compiling)]);
  $("time").append(facts(rows));
  if (!time.phases.length) return;
  const bar = (share) => {
    const fill = el("span", { class: "fill" });
    fill.style.width = `${Math.max(0.5, 100 * share)}%`;
    return el("span", { class: "share" }, fill, el("span", {}, percent(share)));
  };
  const phases = time.phases.map((phase) => [phase.name, duration(phase.median), duration(phase.total), bar(phase.share)]);
  $("time").append(table("Where the time goes after the first step, which compiles", ["phase", "median of a step", "in all", "share"], phases));
}

function drawMemory() {
  if (!DATA.memory.length) { $("memory").append(empty("No memory was logged.")); return; }
  $("memory").append(facts(DATA.memory.map(([name, size]) => [`${name}, at most`, bytes(size)])));
}

function drawEnvironment() {
  $("environment").append(DATA.environment.length ? facts(DATA.environment) : empty("Nothing was saved of the environment."));
}

function drawConfig() {
  $("config").append(DATA.config.length ? facts(DATA.config) : empty("No configuration was saved."));
}

// ------------------------------------------------------------------------------------------------- several runs

function drawComparison() {
  const named = DATA.groups.map((group, i) => [lineName(i), ...["runs", "seeds", "steps"].map((key) => group[key])]);
  const columns = DATA.groups.map((group, i) => lineName(i));
  const ofGroups = (name, first, { rows }) => table(name, [first, ...columns.map((each) => each.cloneNode(true))],
    rows.map(([title, unit, cells]) => [title, ...cells.map((value) => cell(unit, value))]));
  const interval = ({ mean, low, high }) => mean === null ? DASH : short(mean) + (low === null ? "" : ` (${short(low)} to ${short(high)})`);
  $("groups-of-runs").append(table("Lines", ["line", "runs", "seeds", "steps"], named));
  if (DATA.results.length) $("groups-of-runs").append(table("Last values", ["metric", ...columns.map((each) => each.cloneNode(true))],
    DATA.results.map(([name, cells]) => [name, ...cells.map(interval)])), el("p", { class: "note" }, DATA.note));
  $("config").append(DATA.differences.rows.length ? ofGroups("Settings that differ", "setting", DATA.differences) : empty("All settings but seed and directory are the same."));
  $("time").append(DATA.time.rows.length ? ofGroups("Time, means over runs", "of time", DATA.time) : empty("No times were logged."));
  $("memory").append(DATA.memory.rows.length ? ofGroups("Memory, the largest of the runs", "of", DATA.memory) : empty("No memory was logged."));
  $("environment").append(DATA.environment.rows.length ? ofGroups("Of each line", "fact", DATA.environment) : empty("Nothing was saved of the environment."));
}

function drawFooter() {
  const { samples, thinned } = DATA, notes = [];
  const all = samples ? samples.left_out + samples.steps.length : 0;
  if (samples && samples.left_out) notes.push(`${samples.left_out} of ${all} sampled steps were left out of this page; samples.jsonl has them all.`);
  if (thinned) notes.push(`Curves of more than ${thinned} points are thinned; every peak and trough stands.`);
  $("footer").textContent = notes.join(" ");
}

function drawPage() {
  document.addEventListener("scroll", hideTip, { passive: true });
  drawTitle();
  drawAlarms();
  drawCurves();
  if (DATA.groups) drawComparison();
  else { drawTime(); drawMemory(); drawEnvironment(); drawConfig(); drawCompletions(); }
  for (const id of DATA.groups ? ["completions"] : ["runs"]) {
    $(id).remove();
    document.querySelector(`nav a[href="#${id}"]`).remove();
  }
  drawFooter();
}

drawPage();
