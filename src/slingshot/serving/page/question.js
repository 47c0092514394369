// One question on the page, and how it is edited.

import { button, copier, make } from "./dom.js";
import { word } from "./words.js";

export class QuestionView {
  /** @param {import("./store.js").Message} node
   * @param {(node: import("./store.js").Message) => Node[]} versionsOf the way to its other versions
   * @param {(text: string) => void} send asks it anew, as another version */
  constructor(node, versionsOf, send) {
    this.node = node;
    this.versionsOf = versionsOf;
    this.send = send;
    this.element = make("div", { className: "turn user", id: `node-${node.id}` });
  }

  draw() {
    const { node } = this;
    this.element.replaceChildren(make("div", { className: "text", textContent: node.content }),
      make("div", { className: "tools" }, ...this.versionsOf(node), copier(word("copy"), word("copied"), () => node.content),
        button(word("edit"), () => this.edit(), { className: "edit" })));
  }

  edit() {
    const area = make("textarea", { value: this.node.content, rows: 3, label: word("edit") });
    const leave = () => {
      this.draw();
      this.element.querySelector(".edit").focus();
    };
    this.element.replaceChildren(area, make("div", { className: "tools" },
      button(word("save"), () => this.send(area.value)), button(word("cancel"), leave)));
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") leave();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send(area.value);
      }
    });
    area.focus();
  }
}
