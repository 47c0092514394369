// The owner's page: what the server does now, once a second, and did today.

import { $, make } from "./dom.js";
import { get } from "./stream.js";

const KEPT = 120; // seconds of the curve
const SMOOTH = 5; // seconds that "now" looks back

let seen = []; // {time, generated: {model: tokens}}

const count = (number) => Math.round(number).toLocaleString("en");
const share = (part, whole) => (whole ? `${Math.round((100 * part) / whole)}%` : "–");
const dollars = (amount) => `$${amount.toFixed(amount && amount < 0.01 ? 6 : 2)}`;
const perSecond = (number) => (number >= 10 ? count(number) : number.toFixed(1));

const fact = (name, value, more = "") => make("div", {}, make("dt", { textContent: name }), make("dd", {}, `${value} `, make("small", { textContent: more })));

// Tokens a second of a model over the seconds before a reading.
function rate(name, at, back) {
  const first = seen[Math.max(0, at - back)];
  const last = seen[at];
  return last.time > first.time ? (last.generated[name] - first.generated[name]) / (last.time - first.time) : 0;
}

function curve(name) {
  const rates = seen.map((_, at) => rate(name, at, 2)).slice(1);
  const most = Math.max(...rates, 1);
  const points = rates.map((value, at) => `${KEPT - rates.length + at},${(58 - (54 * value) / most).toFixed(1)}`).join(" ");
  const box = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  for (const [key, value] of Object.entries({ class: "rate", viewBox: `0 0 ${KEPT - 1} 60`, preserveAspectRatio: "none", role: "img", "aria-label": `Tokens a second in the last two minutes, at most ${perSecond(most)}` })) box.setAttribute(key, value);
  line.setAttribute("points", points);
  box.append(line);
  return box;
}

function card(model) {
  const { name, runs, context, obstacle, running, waiting_tokens: waiting, generated_tokens: generated, pages } = model;
  const about = [runs, `context of ${count(context)} tokens`].filter(Boolean).join(", ");
  const facts = make(
    "dl", {},
    fact("Tokens a second", perSecond(rate(name, seen.length - 1, SMOOTH))),
    fact("Running", count(running), running === 1 ? "request" : "requests"),
    fact("Waiting", count(waiting), "prompt tokens"),
    fact("Generated", count(generated), "since the start"),
  );
  const parts = [make("h2", { textContent: name }), make("p", { textContent: obstacle ?? about, className: obstacle ? "bad" : "" }), facts, curve(name)];
  if (pages) {
    const bar = make("div", { className: "meter" }, ...[pages.used, pages.kept].map((size) => make("i", { style: `width: ${(100 * size) / pages.all}%` })));
    const told = `Cache: ${count(pages.used)} of ${count(pages.all)} pages in use (${share(pages.used, pages.all)}), ${count(pages.kept)} kept for prompts that begin alike`;
    parts.push(bar, make("div", { className: "fine", textContent: told }));
  }
  return make("article", {}, ...parts);
}

function draw(status) {
  if (seen.length && status.time < seen.at(-1).time) seen = []; // another server, or it began anew
  seen.push({ time: status.time, generated: Object.fromEntries(status.models.map((model) => [model.name, model.generated_tokens])) });
  seen = seen.slice(-KEPT);
  $("state").textContent = `${status.state} · ${status.version}`;
  $("state").className = status.state === "serving" ? "well" : "bad";
  $("models").replaceChildren(...status.models.map(card));
  const today = status.today;
  $("today").hidden = !today;
  if (!today) return;
  $("today").querySelector("dl").replaceChildren(
    fact("Requests", count(today.requests)),
    fact("Prompt tokens", count(today.prompt_tokens), `${share(today.cached_tokens, today.prompt_tokens)} cached`),
    fact("Answer tokens", count(today.completion_tokens), `${share(today.reasoning_tokens, today.completion_tokens)} reasoning`),
    fact("Charged", dollars(today.dollars)),
  );
}

async function watch() {
  try {
    draw(await get("status.json"));
    $("note").hidden = $("ask-key").hidden = true;
    document.body.className = "";
  } catch (error) {
    const locked = error.status === 401 || error.status === 403;
    document.body.className = "stale";
    $("note").textContent = locked ? error.message : `No answer from the server: ${error.message}`;
    $("note").hidden = false;
    $("ask-key").hidden = !locked;
    $("state").textContent = locked ? "locked" : "not reached";
    $("state").className = locked ? "" : "bad";
    if (locked) return; // until a key is given
  }
  setTimeout(watch, 1000);
}

function setTheme(next) {
  document.documentElement.dataset.theme = next;
  localStorage.setItem("theme", next);
}

$("theme").onclick = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
$("ask-key").onsubmit = (event) => {
  event.preventDefault();
  localStorage.setItem("key", $("key").value.trim());
  watch();
};
setTheme(localStorage.getItem("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
watch();
