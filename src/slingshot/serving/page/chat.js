// The chat page: what is asked, what comes back, and the conversation as a tree of messages.

import { AnswerView } from "./answer.js";
import { bodyFor, costOf, take } from "./chunks.js";
import { button, make } from "./dom.js";
import { failureOf, guardDoor } from "./door.js";
import * as store from "./store.js";
import { ask, askOn, get, post } from "./stream.js";
import { sayAll, setLanguage, word } from "./words.js";

const $ = (id) => document.getElementById(id);
const SETTINGS = ["model", "beside", "effort", "budget", "glass"];
const EFFORTS = ["auto", "none", "low", "high", "max"];

let conversations = [];
let current = store.begin();
let models = new Map();
let running = null; // {stop, nodes}: answers on their way
let views = new Map(); // node id -> AnswerView, of what is shown

// What is asked

function messagesFor(leaf, model) {
  const said = store.path(current, leaf).filter((node) => !node.error);
  const turns = models.get(model)?.single_turns ? said.slice(-1) : said;
  return turns.map(({ role, content, reasoning }) => (reasoning ? { role, content, reasoning_content: reasoning } : { role, content }));
}

const asking = (model) => ({
  model,
  effort: $("effort").value,
  budget: Number($("budget").value) || 0,
  glass: $("glass").checked,
  seed: crypto.getRandomValues(new Uint32Array(1))[0] >>> 1,
});

// goesOn: where it was lost, by a reload.
async function answer(node, controller, goesOn) {
  if (!goesOn) {
    const fresh = { content: "", reasoning: "", unfinished: true, begun: Date.now(), chunks: 0, tokens: node.asked.glass ? [] : undefined };
    for (const name of ["error", "first", "thought", "finish", "usage", "seconds", "request", "prompt"]) fresh[name] = undefined;
    Object.assign(node, fresh);
  }
  const { signal } = controller;
  const chunks = goesOn ? askOn(node.request, node.chunks, signal) : ask(bodyFor(node, messagesFor(node.parent, node.asked.model)), signal);
  try {
    for await (const chunk of chunks) {
      take(node, chunk, node.begun);
      show(node);
    }
  } catch (error) {
    if (goesOn && error.status === 404) return; // it is kept for a while only
    if (signal.aborted) node.finish = "stopped";
    else node.error = failureOf(error);
  }
  node.thought ??= Date.now() - node.begun;
  node.unfinished = false;
  views.get(node.id)?.settle();
}

// Run answers side by side until all are whole.
async function run(nodes, goesOn = false) {
  const conversation = current;
  const save = () => conversation.dropped || store.put(conversation);
  const controller = new AbortController();
  const stop = () => {
    controller.abort();
    for (const { request: id } of nodes) if (id) post("v1/chat/completions/control", { id, action: "stop" }).catch(() => {});
  };
  running = { stop, nodes, save };
  const answers = nodes.map((node) => answer(node, controller, goesOn));
  draw();
  await save();
  const saving = setInterval(save, 500);
  await Promise.all(answers);
  clearInterval(saving);
  running = null;
  conversation.updated = Date.now();
  await save();
  conversations = await store.all();
  draw();
  // Read out when it is whole, and only then.
  $("spoken").textContent = conversation === current ? nodes.map((node) => node.error ?? node.content).join("\n") : "";
  if (document.activeElement === document.body && !matchMedia("(pointer: coarse)").matches) $("question").focus();
}

async function send(text, parent) {
  if (running || !text.trim()) return;
  current.leaf = parent;
  current.title ||= text.trim().slice(0, 80);
  localStorage.setItem("open", current.id);
  const question = store.add(current, { role: "user", content: text });
  await reply(question.id);
}

async function reply(parent) {
  if (running) return;
  current.leaf = parent;
  const first = store.add(current, { role: "assistant", asked: asking($("model").value) });
  const nodes = [first];
  if ($("beside").value) {
    nodes.push(store.add(current, { role: "assistant", parent, besides: first.id, asked: { ...first.asked, model: $("beside").value } }));
    current.leaf = first.id;
  }
  const answers = run(nodes);
  toEnd();
  await answers;
}

// The same question with the same seed: the same tokens, with all that is known of them.
async function lookInside(node) {
  if (running) return;
  if (!node.tokens?.length) {
    node.asked = { ...node.asked, glass: true };
    $("note").textContent = word("again_inside");
    await run([node]);
    $("note").textContent = "";
    node.shown = false;
  }
  node.shown = !node.shown;
  if (node.shown && !node.prompt) {
    const { model } = node.asked;
    const asked = { model, messages: messagesFor(node.parent, model), return_token_strs: true };
    node.prompt = await post("tokenize", asked).then((told) => told.token_strs).catch(() => []);
  }
  views.get(node.id)?.look();
}

// What is shown

function versionsOf(node) {
  const versions = store.siblings(current, node);
  const place = versions.indexOf(node);
  if (versions.length < 2 || running || node.besides) return [];
  const go = (step) => () => {
    current.leaf = store.lastBelow(current, versions[place + step].id);
    store.put(current);
    draw();
  };
  return [
    button("‹", go(-1), { label: word("earlier"), disabled: place === 0 }),
    make("span", { textContent: `${place + 1}/${versions.length}` }),
    button("›", go(1), { label: word("later"), disabled: place === versions.length - 1 }),
  ];
}

function toolsOf(node) {
  if (node.unfinished) return [make("span", { textContent: word("unfinished") }), button(word("resume"), () => !running && run([node]))];
  const look = button(word("look"), () => lookInside(node), { title: word("opened"), className: "look" });
  return [...versionsOf(node), button(word("copy"), () => navigator.clipboard.writeText(node.content)), button(word("again"), () => reply(node.parent)),
    node.content || node.reasoning ? look : null].filter(Boolean);
}

function answerOf(node) {
  const view = new AnswerView(node, Boolean(running?.nodes.includes(node)), toolsOf);
  views.set(node.id, view);
  return view.element;
}

function questionOf(node) {
  const turn = make("div", { className: "turn user" });
  const edit = () => {
    const area = make("textarea", { value: node.content, rows: 3, label: word("edit") });
    turn.replaceChildren(area, make("div", { className: "tools" },
      button(word("save"), () => send(area.value, node.parent)), button(word("cancel"), draw)));
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") draw();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send(area.value, node.parent);
      }
    });
    area.focus();
  };
  turn.append(make("div", { className: "text", textContent: node.content }),
    make("div", { className: "tools" }, ...versionsOf(node), running ? null : button(word("edit"), edit)));
  return turn;
}

const atEnd = () => $("thread").scrollHeight - $("thread").scrollTop - $("thread").clientHeight < 60;
const toEnd = () => ($("thread").scrollTop = $("thread").scrollHeight);
const grown = new Set();

// Once a frame, however many tokens came; whoever reads further up is left there.
function show(node) {
  if (!grown.size) {
    requestAnimationFrame(() => {
      const follow = atEnd();
      for (const each of grown) views.get(each.id)?.grow();
      grown.clear();
      if (follow) toEnd();
    });
  }
  grown.add(node);
}

function hello() {
  if (!models.size) return make("div", { className: "hello" }, make("h2", { textContent: "slingshot" }), button(word("retry"), connect));
  const about = models.get($("model").value) ?? {};
  const example = about.example && button(about.example, () => send(about.example, null));
  return make("div", { className: "hello" }, make("h2", { textContent: $("model").value }),
    about.single_turns ? make("p", { className: "muted", textContent: word("prompt") }) : null,
    example ? make("p", {}, `${word("example")} `, example) : null);
}

function draw(jump = false) {
  const follow = jump === true || atEnd();
  const height = $("thread").scrollTop;
  views = new Map();
  const nodes = store.path(current);
  const turns = nodes.map((node) => {
    if (node.role === "user") return questionOf(node);
    const beside = Object.values(current.nodes).find((other) => other.besides === node.id);
    return make("div", { className: `turn${beside ? " pair" : ""}` }, answerOf(node), beside ? answerOf(beside) : null);
  });
  $("thread").replaceChildren(...(turns.length ? turns : [hello()]));
  if (follow) toEnd();
  else $("thread").scrollTop = height;
  $("send").hidden = Boolean(running);
  $("stop").hidden = $("now").hidden = !running;
  const cost = Object.values(current.nodes).reduce((sum, node) => sum + costOf(node, models.get(node.asked?.model)?.price), 0);
  $("price").textContent = cost ? word("price", `$${cost.toPrecision(2)}`) : "";
  drawList();
}

function drawList() {
  const wanted = $("search").value.toLowerCase();
  const holds = (it) => !wanted || it.title.toLowerCase().includes(wanted) || Object.values(it.nodes).some((node) => node.content.toLowerCase().includes(wanted));
  const found = conversations.filter(holds).map((it) => {
    const name = button(it.title, () => open(it), { title: it.title });
    name.setAttribute("aria-current", String(it.id === current.id));
    return make("div", {}, name, button("×", () => drop(it), { className: "remove", label: `${word("remove")}: ${it.title}` }));
  });
  $("list").replaceChildren(...found);
  if (wanted && !found.length) $("list").append(make("p", { className: "muted", textContent: word("none_found") }));
}

function open(conversation) {
  running?.stop();
  current = conversation;
  localStorage.setItem("open", conversation.id);
  unfold(false);
  draw(true);
}

function unfold(open) {
  $("side").classList.toggle("open", open);
  $("menu").setAttribute("aria-expanded", String(open));
}

async function drop(conversation) {
  if (!confirm(word("confirm"))) return;
  if (conversation.id === current.id) {
    current.dropped = true;
    running?.stop();
  }
  await store.remove(conversation.id);
  conversations = await store.all();
  if (conversation.id === current.id) open(store.begin());
  else drawList();
}

// The page's controls

function fillChoices() {
  const option = (value, text = value) => make("option", { value, textContent: text });
  const kept = Object.fromEntries(["model", "beside", "effort"].map((name) => [name, $(name).value || localStorage.getItem(name)]));
  $("model").replaceChildren(...[...models.keys()].map((name) => option(name)));
  $("beside").replaceChildren(option("", word("nothing")), ...[...models.keys()].map((name) => option(name)));
  $("effort").replaceChildren(...EFFORTS.map((name) => option(name, word("effort")[name])));
  for (const [name, value] of Object.entries(kept)) {
    if ([...$(name).options].some((each) => each.value === value)) $(name).value = value;
  }
  $("beside").parentElement.hidden = models.size < 2;
}

function setTheme(next) {
  document.documentElement.dataset.theme = next;
  localStorage.setItem("theme", next);
}

function exportAll() {
  const blob = new Blob([JSON.stringify({ conversations }, null, 1)], { type: "application/json" });
  const link = make("a", { href: URL.createObjectURL(blob), download: "conversations.json" });
  link.click();
  URL.revokeObjectURL(link.href);
}

async function importAll(file) {
  try {
    for (const conversation of store.parse(await file.text())) await store.put(conversation);
    conversations = await store.all();
    drawList();
  } catch (error) {
    $("note").textContent = `${file.name}: ${error.message}`;
  }
  $("file").value = ""; // the same one may be chosen again
}

async function answerNow() {
  for (const node of running?.nodes ?? []) {
    if (node.request) await post("v1/chat/completions/control", { id: node.request, action: "reasoning_end" }).catch(() => {});
  }
}

function listen() {
  const question = $("question");
  const grow = () => {
    question.style.height = "auto";
    question.style.height = `${question.scrollHeight}px`;
  };
  question.addEventListener("input", grow);
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = question.value;
    if (running || !text.trim()) return;
    question.value = "";
    grow();
    send(text, current.leaf);
  });
  question.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("ask").requestSubmit();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && $("side").classList.contains("open")) unfold(false);
    else if (event.key === "Escape" && !$("door").open) running?.stop();
    if (event.ctrlKey && event.key.toLowerCase() === "k") {
      event.preventDefault();
      unfold(true);
      $("search").focus();
    }
    if (event.ctrlKey && event.shiftKey && event.key.toLowerCase() === "o") {
      event.preventDefault();
      open(store.begin());
      question.focus();
    }
  });
  $("stop").onclick = () => running?.stop();
  $("now").onclick = answerNow;
  $("new").onclick = () => open(store.begin());
  $("search").oninput = drawList;
  $("export").onclick = exportAll;
  $("import").onclick = () => $("file").click();
  $("file").onchange = () => $("file").files[0] && importAll($("file").files[0]);
  $("theme").onclick = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  $("menu").onclick = () => unfold(!$("side").classList.contains("open"));
  $("thread").addEventListener("pointerdown", () => unfold(false));
  guardDoor(connect);
  addEventListener("pagehide", () => running?.save());
  $("language").onclick = () => {
    setLanguage();
    fillChoices();
    draw();
  };
  for (const name of SETTINGS) {
    const input = $(name);
    if (input.type === "checkbox") input.checked = localStorage.getItem(name) === "true";
    else if (name === "budget") input.value = localStorage.getItem(name) ?? "";
    input.addEventListener("change", () => {
      localStorage.setItem(name, input.type === "checkbox" ? input.checked : input.value);
      if (name === "model") draw();
    });
  }
}

// Ask for the models, and for a key where the server wants one.
async function connect() {
  try {
    models = new Map((await get("v1/models")).data.map((model) => [model.id, model]));
    $("note").textContent = "";
  } catch (error) {
    $("note").textContent = failureOf(error);
  }
  $("key").hidden = !localStorage.getItem("key");
  fillChoices();
  draw();
}

async function begin() {
  setTheme(localStorage.getItem("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
  sayAll();
  listen();
  conversations = await store.all();
  const last = conversations.find((it) => it.id === localStorage.getItem("open"));
  if (last) current = last;
  await connect();
  toEnd();
  const lost = Object.values(current.nodes).filter((node) => node.unfinished && node.request);
  if (lost.length && models.size) await run(lost, true);
}

begin();
