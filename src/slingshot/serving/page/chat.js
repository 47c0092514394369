// The chat page: the conversation that is shown, what is asked in it, and the page's controls.

import { AnswerView } from "./answer.js";
import { bodyFor, costOf, messagesOf } from "./chunks.js";
import { conversationOf, drawList, listConversations, refresh } from "./conversations.js";
import { $, button, copier, make, note } from "./dom.js";
import { failureOf, guardDoor } from "./door.js";
import { QuestionView } from "./question.js";
import { answerNow, run, runOf, runsOf, saveAll } from "./runs.js";
import * as store from "./store.js";
import { get, post } from "./stream.js";
import { sayAll, setLanguage, word } from "./words.js";

/** @typedef {import("./store.js").Conversation} Conversation */
/** @typedef {import("./store.js").Message} Message */

const SETTINGS = ["model", "beside", "effort", "budget", "glass"];
const EFFORTS = ["auto", "none", "low", "high", "max"];

/** @type {Conversation} */
let current = store.begin();
/** @type {Map<string, any>} their cards by name */
let models = new Map();
/** @type {Map<string, any>} AnswerView or QuestionView by message, of the conversation that is shown */
let views = new Map();
/** @type {HTMLElement | null} its instructions */
let told = null;

// What is asked

const asking = (model) => ({
  model,
  effort: $("effort").value,
  budget: Number($("budget").value) || 0,
  glass: $("glass").checked,
  seed: crypto.getRandomValues(new Uint32Array(1))[0] >>> 1,
});

const messagesBefore = (conversation, node) =>
  messagesOf(store.path(conversation, node.parent), models.get(node.asked.model)?.single_turns, conversation.system);

/** The answers that grow in the branch that is shown. */
const running = () => store.path(current).map(runOf).find(Boolean);

async function start(nodes, goesOn = false) {
  const conversation = current;
  const whole = run(conversation, nodes, {
    bodyOf: (node) => bodyFor(node, messagesBefore(conversation, node)),
    grew: show,
    settled: (node) => views.get(node.id)?.draw(false),
  }, goesOn);
  draw();
  await whole;
  await refresh();
  if (conversation !== current) return;
  const seen = store.path(current).includes(nodes[0]);
  if (seen) draw();
  else drawBar();
  // Read out when it is whole, and only then.
  $("spoken").textContent = seen ? nodes.map((node) => node.error ?? node.content).join("\n") : "";
  if (seen && document.activeElement === document.body && !matchMedia("(pointer: coarse)").matches) $("question").focus();
}

async function send(text, parent) {
  if (running() || !text.trim()) return;
  note();
  current.leaf = parent;
  current.title ||= text.trim().slice(0, 80);
  localStorage.setItem("open", current.id);
  const question = store.add(current, { role: "user", content: text });
  await reply(question.id);
}

async function reply(parent) {
  if (running()) return;
  current.leaf = parent;
  const first = store.add(current, { role: "assistant", asked: asking($("model").value) });
  const nodes = [first];
  if ($("beside").value) {
    nodes.push(store.add(current, { role: "assistant", parent, besides: first.id, asked: { ...first.asked, model: $("beside").value } }));
    current.leaf = first.id;
  }
  const answers = start(nodes);
  toEnd();
  await answers;
}

// The same question with the same seed: the same tokens, with all that is known of them.
async function lookInside(node) {
  if (runOf(node)) return;
  const { usage, seconds, first, thought, finish } = node;
  const { model } = node.asked;
  if (!node.tokens?.length) {
    node.asked = { ...node.asked, glass: true };
    note(word("again_inside"));
    await start([node]);
    note();
    if (!node.error) Object.assign(node, { usage, seconds, first, thought, finish, looked: node.usage });
    node.shown = false;
  }
  node.shown = !node.shown;
  if (node.shown && !node.prompt) {
    const asked = { model, messages: messagesBefore(current, node), return_token_strs: true };
    node.prompt = await post("tokenize", asked).then((told) => told.token_strs).catch(() => []);
  }
  views.get(node.id)?.draw(false);
  drawBar();
}

/** Go on with answers that a reload cut off. */
function resume() {
  for (const node of Object.values(current.nodes)) {
    if (!node.unfinished || !node.request || node.besides || runOf(node)) continue;
    start([node, besideOf(node)].filter((its) => its?.unfinished && its.request), true);
  }
}

// What is shown

const besideOf = (node) => Object.values(current.nodes).find((other) => other.besides === node.id);

function versionsOf(node) {
  const versions = store.siblings(current, node);
  const place = versions.indexOf(node);
  if (versions.length < 2 || node.besides) return [];
  const go = (step) => () => {
    const other = versions[place + step];
    current.leaf = store.lastBelow(current, other.id);
    if (!runsOf(current).length) store.put(current);
    draw();
    const [earlier, later] = $(`node-${other.id}`).querySelectorAll(".version");
    const [same, back] = step < 0 ? [earlier, later] : [later, earlier];
    (same.disabled ? back : same).focus();
  };
  return [
    button("‹", go(-1), { label: word("earlier"), className: "version", disabled: place === 0 }),
    make("span", { textContent: `${place + 1}/${versions.length}` }),
    button("›", go(1), { label: word("later"), className: "version", disabled: place === versions.length - 1 }),
  ];
}

function toolsOf(node) {
  if (runOf(node)) return versionsOf(node);
  if (node.unfinished) return [...versionsOf(node), make("span", { textContent: word("unfinished") }), button(word("resume"), () => start([node]))];
  const look = button(word("look"), () => lookInside(node), { title: word("opened"), className: "look" });
  return [...versionsOf(node), copier(word("copy"), word("copied"), () => node.content), button(word("again"), () => reply(node.parent)),
    node.content || node.reasoning ? look : null].filter(Boolean);
}

function viewOf(node) {
  const make = () => (node.role === "user" ? new QuestionView(node, versionsOf, (text) => send(text, node.parent)) : new AnswerView(node, toolsOf));
  const view = views.get(node.id) ?? make();
  views.set(node.id, view);
  view.draw(Boolean(runOf(node)));
  return view.element;
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
      drawNow();
      if (follow) toEnd();
    });
  }
  grown.add(node);
}

// What a model is told of the whole conversation, before it begins.
function instructions() {
  const area = make("textarea", { rows: 2, value: current.system ?? "", placeholder: word("system"), label: word("system") });
  area.oninput = () => (current.system = area.value.trim());
  return area;
}

function hello() {
  if (!models.size) return make("div", { className: "hello" }, make("h2", { textContent: "slingshot" }), button(word("retry"), connect));
  const about = models.get($("model").value) ?? {};
  const example = about.example && button(about.example, () => send(about.example, null));
  return make("div", { className: "hello" }, make("h2", { textContent: $("model").value }),
    about.single_turns ? make("p", { className: "muted", textContent: word("prompt") }) : instructions(),
    example ? make("p", {}, `${word("example")} `, example) : null);
}

// Turns that stand stay where they are.
function draw(jump = false) {
  const thread = $("thread");
  const follow = jump || atEnd();
  const height = thread.scrollTop;
  const turns = store.path(current).map((node) => {
    const element = viewOf(node);
    if (node.role === "user") return element;
    const beside = besideOf(node);
    const turn = element.parentElement ?? make("div", { className: `turn${beside ? " pair" : ""}` }, element);
    const other = beside && viewOf(beside);
    if (other && other.parentElement !== turn) turn.append(other);
    return turn;
  });
  if (turns.length && current.system) turns.unshift((told ??= make("div", { className: "turn system", textContent: current.system })));
  (turns.length ? turns : [hello()]).forEach((turn, place) => turn === thread.children[place] || thread.insertBefore(turn, thread.children[place] ?? null));
  while (thread.children.length > Math.max(turns.length, 1)) thread.lastChild.remove();
  if (follow) toEnd();
  else thread.scrollTop = height;
  drawBar();
}

// Only a reasoning can be cut short.
function drawNow() {
  const hidden = !running()?.nodes.some((node) => !node.content);
  if ($("now").hidden !== hidden) $("now").hidden = hidden;
}

// What is beside the conversation.
function drawBar() {
  const busy = Boolean(running());
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  drawNow();
  $("thread").classList.toggle("busy", busy);
  const cost = Object.values(current.nodes).reduce((sum, node) => sum + costOf(node, models.get(node.asked?.model)?.price), 0);
  $("price").textContent = cost ? word("price", `$${cost.toPrecision(2)}`) : "";
  drawList(current);
}

function forget() {
  views = new Map();
  told = null;
}

/** @param {Conversation} conversation */
function open(conversation) {
  current = conversation;
  forget();
  localStorage.setItem("open", conversation.id);
  unfold(false);
  note();
  draw(true);
  resume();
}

function unfold(open) {
  $("side").classList.toggle("open", open);
  $("menu").setAttribute("aria-expanded", String(open));
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

function listenToKeys() {
  document.addEventListener("keydown", (event) => {
    const control = event.ctrlKey || event.metaKey;
    if (event.key === "Escape" && $("side").classList.contains("open")) unfold(false);
    else if (event.key === "Escape" && !$("door").open) running()?.stop();
    if (control && event.key.toLowerCase() === "k") {
      event.preventDefault();
      unfold(true);
      $("search").focus();
    }
    if (control && event.shiftKey && event.key.toLowerCase() === "o") {
      event.preventDefault();
      open(store.begin());
      $("question").focus();
    }
  });
}

function listenToQuestion() {
  const question = $("question");
  const grow = () => {
    question.style.height = "auto";
    question.style.height = `${question.scrollHeight}px`;
  };
  question.addEventListener("input", grow);
  question.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("ask").requestSubmit();
    }
  });
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = question.value;
    if (running() || !text.trim()) return;
    question.value = "";
    grow();
    send(text, current.leaf);
  });
}

function listen() {
  listenToKeys();
  listenToQuestion();
  guardDoor(connect);
  $("stop").onclick = () => running()?.stop();
  $("now").onclick = () => answerNow(running());
  $("new").onclick = () => open(store.begin());
  $("theme").onclick = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  $("menu").onclick = () => unfold(!$("side").classList.contains("open"));
  $("thread").addEventListener("pointerdown", () => unfold(false));
  $("language").onclick = () => {
    setLanguage();
    fillChoices();
    forget();
    draw();
  };
  addEventListener("pagehide", saveAll);
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
    note();
  } catch (error) {
    note(failureOf(error));
  }
  $("key").hidden = !localStorage.getItem("key");
  fillChoices();
  draw();
  if (models.size) resume();
}

async function begin() {
  setTheme(localStorage.getItem("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
  sayAll();
  listen();
  await listConversations(open);
  current = conversationOf(localStorage.getItem("open")) ?? current;
  await connect();
  toEnd();
}

begin();
