// The conversations at the side: searched, opened, named, deleted, written to a file and read from one.

import { $, button, make, note } from "./dom.js";
import { growing, runsOf } from "./runs.js";
import * as store from "./store.js";
import { word } from "./words.js";

/** @typedef {import("./store.js").Conversation} Conversation */

/** @type {Conversation[]} */
let conversations = [];
/** @type {Conversation} */
let shown;
/** @type {(conversation: Conversation) => void} */
let open;

/** @param {Conversation} conversation the one on the page */
export function drawList(conversation = shown) {
  shown = conversation;
  const wanted = $("search").value.toLowerCase();
  const holds = (it) => !wanted || it.title.toLowerCase().includes(wanted) || Object.values(it.nodes).some((node) => node.content.toLowerCase().includes(wanted));
  const found = conversations.filter(holds).map(rowOf);
  $("list").replaceChildren(...found);
  if (wanted && !found.length) $("list").append(make("p", { className: "muted", textContent: word("none_found") }));
}

function rowOf(it) {
  const name = button(it.title, () => open(it), { title: it.title, className: runsOf(it).length ? "name working" : "name" });
  name.setAttribute("aria-current", String(it.id === shown.id));
  const row = make("div", {}, name, button("✎", () => rename(it, row), { className: "more", label: `${word("rename")}: ${it.title}` }),
    button("×", () => drop(it), { className: "more", label: `${word("remove")}: ${it.title}` }));
  return row;
}

function rename(it, row) {
  const field = make("input", { value: it.title, label: word("rename") });
  row.replaceChildren(field);
  field.select();
  const done = async (title) => {
    field.onblur = null;
    if (title) it.title = title;
    await store.put(it);
    drawList();
    [.../** @type {NodeListOf<HTMLElement>} */ ($("list").querySelectorAll(".name"))].find((name) => name.title === it.title)?.focus();
  };
  field.onblur = () => done(field.value.trim());
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.isComposing) done(field.value.trim());
    if (event.key === "Escape") done("");
    if (event.key === "Escape" || event.key === "Enter") event.stopPropagation();
  });
}

async function drop(it) {
  it.dropped = true;
  runsOf(it).forEach((run) => run.stop());
  await store.remove(it.id);
  if (it.id === shown.id) open(store.begin());
  await refresh();
  const undo = button(word("undo"), async () => {
    delete it.dropped;
    await store.put(it);
    note();
    await refresh();
    open(it);
  });
  note(`${word("removed", it.title)} `, undo);
  undo.focus();
}

/** Read them anew; those that are shown or grow are the ones that are here. */
export async function refresh() {
  conversations = (await store.all()).map((it) => (it.id === shown?.id ? shown : growing(it.id) ?? it));
  if (shown) drawList();
}

/** @param {string | null} id @returns {Conversation | undefined} */
export const conversationOf = (id) => conversations.find((it) => it.id === id);

function exportAll() {
  const blob = new Blob([JSON.stringify({ conversations }, null, 1)], { type: "application/json" });
  const link = make("a", { href: URL.createObjectURL(blob), download: "conversations.json" });
  link.click();
  URL.revokeObjectURL(link.href);
}

async function importAll(file) {
  try {
    const given = store.parse(await file.text());
    for (const conversation of given) await store.put(conversation);
    await refresh();
    const again = given.find((it) => it.id === shown.id);
    if (again && !runsOf(shown).length) open(again);
  } catch (error) {
    note(`${file.name}: ${error.message}`);
  }
  $("file").value = ""; // the same one may be chosen again
}

/** @param {(conversation: Conversation) => void} show puts one on the page */
export async function listConversations(show) {
  open = show;
  $("search").oninput = () => drawList();
  $("export").onclick = exportAll;
  $("import").onclick = () => $("file").click();
  $("file").onchange = () => $("file").files[0] && importAll($("file").files[0]);
  await refresh();
}
