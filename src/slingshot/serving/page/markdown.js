// Markdown with mathematics and coloured code, made safe: an answer is untrusted text.

import { copier, make } from "./dom.js";
import { word } from "./words.js";

const { marked, DOMPurify, katex, hljs } = /** @type {any} */ (window);

// Code first: what looks like mathematics inside it is none.
const PARTS = /(```[\s\S]*?(?:```|$)|`[^`\n]*`)|\$\$([\s\S]+?)\$\$|\\\[([\s\S]+?)\\\]|\\\(([\s\S]+?)\\\)|\$(?!\s)([^$\n]+?)(?<!\s)\$(?!\d)/g;
const PLACES = /\uE000(\d+)\uE001/g; // where formulas stand while the rest is read
const GUESSED = 2000; // characters of code whose language is guessed
// Pictures would be fetched from other hosts: who reads what stays here. Nor may an answer lay itself over the page.
const SAFE = {
  RETURN_DOM_FRAGMENT: true,
  FORBID_TAGS: ["img", "picture", "source", "video", "audio", "iframe", "form", "input", "button", "textarea", "select", "style", "svg"],
  FORBID_ATTR: ["id", "name", "style"],
  ADD_ATTR: ["target"],
};

// Any other tag is text: so a reader sees it, and no parser sees its attributes.
const OTHER_TAG = /<(?!\/?(?:b|br|code|del|details|em|i|kbd|li|ol|p|pre|s|strong|sub|summary|sup|u|ul)\s*\/?>)/gi;

const escape = (text) => text.replace(/[&<>"]/g, (sign) => `&#${sign.charCodeAt(0)};`);

marked.use({
  gfm: true,
  breaks: true,
  renderer: {
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    html: ({ text }) => text.replace(OTHER_TAG, "&lt;"),
    code({ text, lang }) {
      const known = lang && hljs.getLanguage(lang);
      const coloured = known ? hljs.highlight(text, { language: lang }).value : text.length < GUESSED ? hljs.highlightAuto(text).value : escape(text);
      return `<pre tabindex="0"><code class="hljs">${coloured}</code></pre>`;
    },
  },
});

DOMPurify.addHook("afterSanitizeAttributes", (element) => {
  if (element.tagName === "A") {
    element.setAttribute("target", "_blank");
    element.setAttribute("rel", "noopener noreferrer");
  }
});

DOMPurify.addHook("uponSanitizeAttribute", (_, data) => {
  if (data.attrName === "class" && !data.attrValue.startsWith("hljs")) data.keepAttr = false;
});

// Put formulas where their places are, in text alone: nothing is written into an attribute.
function typeset(fragment, formulas) {
  const walker = document.createTreeWalker(fragment, NodeFilter.SHOW_TEXT);
  /** @type {Text[]} */
  const found = [];
  while (walker.nextNode()) {
    const text = /** @type {Text} */ (walker.currentNode);
    if (text.data.includes("\uE000")) found.push(text);
  }
  for (const text of found) {
    const parts = text.data.split(PLACES).map((part, place) => {
      const span = make("span", place % 2 ? {} : { textContent: part });
      const { source, displayMode } = (place % 2 && formulas[part]) || {};
      if (source) katex.render(source, span, { displayMode, throwOnError: false, trust: false, maxExpand: 100 });
      return span;
    });
    text.replaceWith(...parts);
  }
  return fragment;
}

/** An element that shows a text which grows: blocks that stand are not touched again. */
export class GrowingMarkdown {
  /** @param {HTMLElement} element */
  constructor(element) {
    this.element = element;
    this.text = "";
    this.shown = []; // the source of every block
  }

  /** @param {string} text */
  show(text) {
    if (text === this.text) return;
    this.text = text;
    const formulas = [];
    const rest = text.replace(/[\uE000\uE001]/g, "").replace(PARTS, (whole, code, ...found) => {
      if (code !== undefined) return whole;
      const [display1, display2, inline1, inline2] = found;
      const displayMode = (display1 ?? display2) !== undefined;
      formulas.push({ source: display1 ?? display2 ?? inline1 ?? inline2, displayMode });
      return `\uE000${formulas.length - 1}\uE001`;
    });
    const tokens = marked.lexer(rest);
    tokens.forEach((token, place) => {
      const source = token.raw.replace(PLACES, (_, number) => `\uE000${formulas[number]?.source}\uE001`);
      if (this.shown[place] === source) return;
      this.shown[place] = source;
      const block = this.element.children[place] ?? this.element.appendChild(make("div"));
      block.replaceChildren(typeset(DOMPurify.sanitize(marked.parser([token]), SAFE), formulas));
      for (const code of block.querySelectorAll("pre")) code.before(copier(word("copy"), word("copied"), () => code.textContent));
    });
    this.shown.length = tokens.length;
    while (this.element.children.length > tokens.length) this.element.lastChild.remove();
  }
}
