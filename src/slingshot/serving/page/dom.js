// Elements, made in one line.  make("p", {className: "bad"}, "text", child, null)

export function make(tag, properties = {}, ...children) {
  const { label, ...own } = properties;
  const element = Object.assign(document.createElement(tag), own);
  if (label) element.setAttribute("aria-label", label);
  element.append(...children.filter((child) => child != null));
  return element;
}

export const button = (text, act, properties = {}) => make("button", { type: "button", textContent: text, onclick: act, ...properties });
