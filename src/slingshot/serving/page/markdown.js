// Markdown with mathematics and coloured code, made safe: an answer is untrusted text.

const { marked, DOMPurify, katex, hljs } = window;

// Code first: what looks like mathematics inside it is none.
const PARTS = /(```[\s\S]*?(?:```|$)|`[^`\n]*`)|\$\$([\s\S]+?)\$\$|\\\[([\s\S]+?)\\\]|\\\(([\s\S]+?)\\\)|\$(?!\s)([^$\n]+?)(?<!\s)\$(?!\d)/g;

marked.use({
  gfm: true,
  breaks: true,
  renderer: {
    code({ text, lang }) {
      const known = lang && hljs.getLanguage(lang) ? hljs.highlight(text, { language: lang }) : hljs.highlightAuto(text);
      return `<pre><code class="hljs">${known.value}</code></pre>`;
    },
  },
});

DOMPurify.addHook("afterSanitizeAttributes", (element) => {
  if (element.tagName === "A") {
    element.setAttribute("target", "_blank");
    element.setAttribute("rel", "noopener noreferrer");
  }
});

export function markdown(text) {
  const formulas = [];
  const marked_up = text.replace(PARTS, (whole, code, ...found) => {
    if (code !== undefined) return whole;
    const [display1, display2, inline1, inline2] = found;
    const displayMode = (display1 ?? display2) !== undefined;
    const formula = display1 ?? display2 ?? inline1 ?? inline2;
    formulas.push(katex.renderToString(formula, { displayMode, throwOnError: false, trust: false, maxExpand: 100 }));
    return `\uE000${formulas.length - 1}\uE001`;
  });
  const html = marked.parse(marked_up).replace(/\uE000(\d+)\uE001/g, (_, number) => formulas[number] ?? "");
  // Pictures would be fetched from other hosts: who reads what stays here.
  return DOMPurify.sanitize(html, { FORBID_TAGS: ["img", "video", "audio", "iframe", "form", "input", "style"], ADD_ATTR: ["target"] });
}
