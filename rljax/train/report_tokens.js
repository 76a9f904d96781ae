// The tokens of a completion, colored by one of the numbers that were recorded of them, and the turns of a conversation.

const NAMES = {
  advantage: "advantage", log_ratio: "log-ratio", kl: "KL to the reference", entropy: "entropy", logp: "log-prob", mask: "mask",
};
const rank = (name) => (name in NAMES ? Object.keys(NAMES).indexOf(name) : 99);
const quantities = (record) => Object.keys(record.tokens)
  .filter((name) => !["id", "text", "chosen"].includes(name)).sort((a, b) => rank(a) - rank(b));
const label = (name) => NAMES[name] || name;
const recorded = (name, x) => (x > 0 && name !== "entropy" ? "+" : "") + minus(String(x)); // every digit of samples.jsonl

function scalesOf(records) {
  // One scale for all completions of a step, so that their colors compare; the 98th percentile, so that one token does not pale the rest.
  const scales = {}, every = Math.ceil(records.length / 400), some = records.filter((_, i) => i % every === 0);
  for (const name of new Set(some.flatMap(quantities))) {
    const sizes = some.flatMap((r) => r.tokens[name] || []).filter((v) => v !== null).map(Math.abs).sort((a, b) => a - b);
    scales[name] = sizes[Math.floor(0.98 * (sizes.length - 1))] || sizes[sizes.length - 1] || 1;
  }
  return scales;
}

function drawTokens(record, scales) {
  const names = quantities(record), box = el("div", { class: "tokens" });
  const chosen = names.includes(view.color) ? view.color : names.includes("advantage") ? "advantage" : names[0];
  const flow = el("div", { class: "flow", tabindex: 0, role: "group", "aria-label": "tokens; arrow keys go from one to the next" },
    ...record.tokens.text.map((text, i) => drawToken(record.tokens, text, i)));
  const show = (name) => {
    view.color = name;
    buttons.forEach((button) => button.setAttribute("aria-pressed", button.dataset.name === name));
    legend.replaceChildren(...legendOf(name, scales[name]));
    [...flow.children].forEach((span, i) => { span.style.background = colorOf(record.tokens, name, i, scales[name]); });
  };
  const buttons = names.map((name) => el("button", { "data-name": name, onclick: () => { show(name); writeHash(); } }, label(name)));
  const legend = el("div", { class: "legend" });
  const point = (event) => { const span = event.target.closest(".flow > span"); if (span) showTip(span, flow, record.tokens); };
  flow.addEventListener("pointerover", point);
  flow.addEventListener("click", point);
  flow.addEventListener("pointerleave", hideTip);
  flow.addEventListener("blur", hideTip);
  flow.addEventListener("keydown", (event) => stepTip(event, flow, record.tokens));
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
      el("p", { class: "meta" }, ...facts.map((fact) => el("span", {}, fact))),
      el("div", { class: "text", tabindex: 0, role: "group", "aria-label": facts[0] }, turn.text || "(no text)"));
  });
  return el("ol", { class: "turns" }, ...parts);
}

function legendOf(name, scale) {
  const others = el("span", { class: "faint" }, "grey: not the policy's");
  if (name === "entropy") return ["0", el("span", { class: "scale half" }), short(scale), others];
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

function stepTip(event, flow, tokens) {
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (event.key === "Escape") hideTip();
  if (!by) return;
  event.preventDefault();
  const at = [...flow.children].findIndex((span) => span.classList.contains("at"));
  const next = flow.children[Math.max(0, Math.min(flow.children.length - 1, at + by))];
  if (next) showTip(next, flow, tokens);
}

function showTip(span, flow, tokens) {
  const i = [...flow.children].indexOf(span), tip = $("tip");
  const rows = [["token", `${i + 1} of ${flow.children.length}`], ["id", String(tokens.id[i])]];
  for (const name of quantities({ tokens }).filter((key) => key !== "mask")) {
    const x = tokens[name][i];
    if (x !== null) rows.push([label(name), recorded(name, x)]);
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

