// The glass box: what a model did, token by token. Colours say how sure it was; a token opened shows what else it might
// have said, and which experts every layer chose.

/**
 * @typedef {object} Token
 * @property {string} text
 * @property {number} logprob
 * @property {"reasoning" | "content"} kind
 * @property {[string, number][]} top what else was likely, with its logprobs
 * @property {number[][]} experts those that every layer chose
 * @property {boolean} drafted whether it was guessed before it was computed
 */

import { make } from "./dom.js";
import { word } from "./words.js";

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  if (share < 0.01) return "<0.01%";
  return share > 99.5 && logprob < -0.0001 ? `${Math.min(share, 99.99).toFixed(2)}%` : `${share.toFixed(share < 1 ? 2 : 0)}%`;
}

// Signs that would not be seen, by others that are.
const seen = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣");

// How often each expert of a layer was chosen, as a share of the busiest.
function loads(tokens) {
  const layers = [];
  for (const token of tokens) {
    (token.experts ?? []).forEach((chosen, layer) => {
      layers[layer] ??= new Map();
      for (const expert of chosen) layers[layer].set(expert, (layers[layer].get(expert) ?? 0) + 1);
    });
  }
  return layers;
}

function expertsOf(token, layers, counts) {
  const grid = make("div", { className: "experts" });
  grid.setAttribute("role", "img");
  grid.setAttribute("aria-label", `${word("experts")}: ${token.experts.map((chosen) => chosen.join(" ")).join("; ")}`);
  token.experts.forEach((chosen, layer) => {
    const busiest = Math.max(...layers[layer].values());
    const row = make("div", { className: "layer" }, make("span", { textContent: layer + 1 }));
    for (let expert = 0; expert < counts[layer]; expert++) {
      const load = (layers[layer].get(expert) ?? 0) / busiest;
      const cell = make("i", { title: `${expert}` });
      cell.style.setProperty("--load", load.toFixed(2));
      cell.classList.toggle("chosen", chosen.includes(expert));
      row.append(cell);
    }
    grid.append(row);
  });
  return grid;
}

// The prompt, what of it was in the cache marked: a prefix, for the cache holds prompts from their beginning.
/** @param {import("./store.js").Message} node */
function promptOf({ usage, prompt }) {
  if (!usage) return [];
  const { prompt_tokens: all, prompt_cache_hit_tokens: hit } = usage;
  const told = make("p", { className: "muted", textContent: word("from_cache", hit, all) });
  if (prompt?.length !== all) return [told];
  const part = (tokens, name) => make("span", { className: name, textContent: tokens.join("") });
  return [told, make("div", { className: "prompt" }, part(prompt.slice(0, hit), "hit"), part(prompt.slice(hit), "miss"))];
}

// What the lines and colours mean.
function legendOf(tokens) {
  const drafted = tokens.filter((token) => token.drafted).length;
  return make("p", { className: "muted legend", textContent: drafted ? `${word("unsure")} ${word("drafts", drafted, tokens.length)}` : word("unsure") });
}

const named = (token) => (token.drafted ? `${percent(token.logprob)}, ${word("drafted")}` : percent(token.logprob));

/** @param {import("./store.js").Message} node an answer with its tokens, its usage, and the tokens of its prompt where they are known */
export function glassBox(node) {
  const { tokens } = node;
  const layers = loads(tokens);
  const counts = layers.map((layer) => Math.max(...layer.keys()) + 1);
  const box = make("div", { className: "glass" });
  const details = make("div", { className: "inside" });
  details.setAttribute("role", "status");

  const open = (token, button) => {
    for (const other of box.querySelectorAll(".token[aria-pressed=true]")) other.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-pressed", "true");
    const rows = token.top.filter(([text, logprob]) => text !== token.text || Math.abs(logprob - token.logprob) > 1e-3).map(([text, logprob]) =>
      make("li", {}, make("code", { textContent: seen(text) }), make("b", { textContent: percent(logprob) })));
    details.replaceChildren(
      make("p", {}, make("code", { textContent: seen(token.text) }), ` ${word("probability")} ${named(token)}`),
      rows.length ? make("p", { className: "muted", textContent: word("instead") }) : make("p", { className: "muted", textContent: word("none_else") }),
      make("ol", {}, ...rows),
      ...(token.experts?.length ? [make("p", { className: "muted", textContent: `${word("experts")}. ${word("load")}.` }), expertsOf(token, layers, counts)] : []),
    );
  };

  const line = make("div", { className: "tokens" });
  for (const token of tokens) {
    const button = make("button", { className: `token ${token.kind}${token.drafted ? " drafted" : ""}`, textContent: token.text.replaceAll("\n", "⏎\n"), tabIndex: line.children.length ? -1 : 0 });
    button.style.setProperty("--sure", Math.exp(token.logprob).toFixed(3));
    button.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-label", `${token.text} ${named(token)}`);
    button.addEventListener("click", () => open(token, button));
    button.addEventListener("focus", () => open(token, button));
    line.append(button);
  }
  line.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const buttons = /** @type {HTMLElement[]} */ ([...line.children]);
    const next = step && buttons[buttons.indexOf(/** @type {HTMLElement} */ (document.activeElement)) + step];
    if (!next) return;
    event.preventDefault();
    buttons[buttons.indexOf(next) - step].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  box.append(make("div", { className: "asked" }, ...promptOf(node), legendOf(tokens)), line, details);
  return box;
}
