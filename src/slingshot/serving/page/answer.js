// One answer on the page. While it grows only what is new is drawn.

import { make } from "./dom.js";
import { glassBox } from "./glass.js";
import { GrowingMarkdown } from "./markdown.js";
import { word } from "./words.js";

function statisticsOf(node) {
  if (!node.usage || !node.seconds) return node.finish === "stopped" ? word("stopped") : "";
  const count = node.usage.completion_tokens;
  const speed = (count / node.seconds).toFixed(count / node.seconds < 10 ? 1 : 0);
  const parts = [word("rate", count, speed, ((node.first ?? 0) / 1000).toFixed(2))];
  if (node.usage.prompt_cache_hit_tokens) parts.push(word("cached", node.usage.prompt_cache_hit_tokens));
  if (node.finish === "length") parts.push(word("cut"));
  return parts.join(", ");
}

function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export class AnswerView {
  /** @param {import("./store.js").Message} node
   * @param {(node: import("./store.js").Message) => Node[]} toolsOf what can be done with it */
  constructor(node, toolsOf) {
    this.node = node;
    this.toolsOf = toolsOf;
    this.growing = false;
    this.box = null;
    this.summary = make("summary");
    this.said = document.createTextNode("");
    this.reasoning = make("details", { className: "reasoning", open: node.open ?? false }, this.summary, make("div", { className: "said" }, this.said));
    this.summary.addEventListener("click", () => (node.open = !this.reasoning.open));
    this.text = new GrowingMarkdown(make("div", { className: "text" }));
    this.error = make("p", { className: "bad" });
    this.tools = make("div", { className: "tools" });
    this.element = make("div", { className: "answer", id: `node-${node.id}` }, make("div", { className: "who", textContent: node.asked.model }),
      this.reasoning, this.text.element, this.error, this.tools);
  }

  /** All of it but the glass box, which a growing answer does not have. @param {boolean} growing whether it is on its way */
  draw(growing) {
    const { node } = this;
    this.growing = growing;
    this.grow();
    this.tools.replaceChildren(...this.toolsOf(node), make("span", { textContent: growing || node.unfinished ? "" : statisticsOf(node) }));
    if (!growing) this.look();
  }

  /** What came since. */
  grow() {
    const { node } = this;
    const thinking = this.growing && !node.content;
    this.reasoning.hidden = !node.reasoning;
    this.reasoning.classList.toggle("working", thinking);
    this.element.classList.toggle("waiting", thinking && !node.reasoning);
    if (node.open === undefined && this.reasoning.open !== thinking) this.reasoning.open = thinking;
    const tokens = node.usage?.completion_tokens_details.reasoning_tokens;
    say(this.summary, thinking ? word("thinking") : word("thought", ((node.thought ?? 0) / 1000).toFixed(1), tokens));
    if (node.reasoning.length < this.said.length) this.said.data = "";
    this.said.appendData(node.reasoning.slice(this.said.length));
    this.text.show(node.content);
    say(this.error, node.error ?? "");
  }

  /** Fold the glass box out or in. */
  look() {
    const { node } = this;
    const wanted = Boolean(node.shown && node.tokens?.length);
    if (wanted !== Boolean(this.box)) {
      this.box?.remove();
      this.box = wanted ? glassBox(node) : null;
      if (this.box) this.element.append(this.box);
    }
    this.tools.querySelector(".look")?.setAttribute("aria-expanded", String(Boolean(this.box)));
  }
}
