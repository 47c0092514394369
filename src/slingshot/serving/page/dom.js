// Elements, made in one line.  make("p", {className: "bad"}, "text", child, null)

/** @type {(id: string) => any} the element of index.html that is called so */
export const $ = (id) => document.getElementById(id);

/** @param {string} tag @param {object} properties its own, and `label` for aria-label @param {...(Node | string | null)} children @returns {any} */
export function make(tag, properties = {}, ...children) {
  const { label, ...own } = properties;
  const element = Object.assign(document.createElement(tag), own);
  if (label) element.setAttribute("aria-label", label);
  element.append(...children.filter((child) => child != null));
  return element;
}

/** @param {string} text @param {() => void} act @param {object} properties @returns {HTMLButtonElement} */
export const button = (text, act, properties = {}) => make("button", { type: "button", textContent: text, onclick: act, ...properties });

/** What the page has to say above the question; nothing: nothing. @param {...(Node | string)} said */
export const note = (...said) => $("note").replaceChildren(...said);

/** A button that copies. Where the page came unencrypted from another machine, browsers have no clipboard for it but this old one.
 * @param {string} name @param {string} copied what it says then @param {() => string} textOf @returns {HTMLButtonElement} */
export function copier(name, copied, textOf) {
  const its = button(name, async () => {
    if (navigator.clipboard) await navigator.clipboard.writeText(textOf());
    else {
      const field = make("textarea", { value: textOf(), className: "unseen" });
      its.after(field);
      field.select();
      document.execCommand("copy");
      field.remove();
      its.focus();
    }
    its.textContent = copied;
    setTimeout(() => (its.textContent = name), 1500);
  }, { className: "copy" });
  its.setAttribute("aria-live", "polite");
  return its;
}
