// The glass box: what a model did, token by token. Colours say how sure it was; a token opened shows what else it might
// have said, and which experts every layer chose.
//   tokens: [{text, logprob, kind, top: [[text, logprob], ...], experts: [[expert, ...] of a layer, ...], from}]

import { word } from "./words.js";

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(logprob > -4.6 ? 0 : 2)}%`;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

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
  const grid = element("div", { className: "experts" });
  grid.setAttribute("role", "img");
  grid.setAttribute("aria-label", `${word("experts")}: ${token.experts.map((chosen) => chosen.join(" ")).join("; ")}`);
  token.experts.forEach((chosen, layer) => {
    const busiest = Math.max(...layers[layer].values());
    const row = element("div", { className: "layer" }, element("span", { textContent: layer + 1 }));
    for (let expert = 0; expert < counts[layer]; expert++) {
      const load = (layers[layer].get(expert) ?? 0) / busiest;
      const cell = element("i", { title: `${expert}` });
      cell.style.setProperty("--load", load.toFixed(2));
      cell.classList.toggle("chosen", chosen.includes(expert));
      row.append(cell);
    }
    grid.append(row);
  });
  return grid;
}

export function glassBox(tokens) {
  const layers = loads(tokens);
  const counts = layers.map((layer) => Math.max(...layer.keys()) + 1);
  const box = element("div", { className: "glass" });
  const details = element("div", { className: "inside" });
  details.setAttribute("role", "status");

  const open = (token, button) => {
    for (const other of box.querySelectorAll(".token[aria-pressed=true]")) other.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-pressed", "true");
    const rows = token.top.filter(([text]) => text !== token.text).map(([text, logprob]) =>
      element("li", {}, element("code", { textContent: text }), element("b", { textContent: percent(logprob) })));
    details.replaceChildren(
      element("p", {}, element("code", { textContent: token.text }), ` ${word("probability")} ${percent(token.logprob)}`),
      rows.length ? element("p", { className: "muted", textContent: word("instead") }) : element("p", { className: "muted", textContent: word("none_else") }),
      element("ol", {}, ...rows),
      ...(token.experts?.length ? [element("p", { className: "muted", textContent: `${word("experts")}. ${word("load")}.` }), expertsOf(token, layers, counts)] : []),
    );
  };

  const line = element("div", { className: "tokens" });
  for (const token of tokens) {
    const button = element("button", { className: `token ${token.kind}`, textContent: token.text.replaceAll("\n", "⏎\n") });
    button.style.setProperty("--sure", Math.exp(token.logprob).toFixed(3));
    button.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-label", `${token.text} ${percent(token.logprob)}`);
    button.addEventListener("click", () => open(token, button));
    button.addEventListener("focus", () => open(token, button));
    line.append(button);
  }
  line.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const buttons = [...line.children];
    const next = step && buttons[buttons.indexOf(document.activeElement) + step];
    if (next) next.focus();
  });
  box.append(line, details);
  return box;
}
