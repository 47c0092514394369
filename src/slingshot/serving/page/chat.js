// The chat page: what is asked, what comes back, and the conversation as a tree of messages.

import { glassBox } from "./glass.js";
import { markdown } from "./markdown.js";
import * as store from "./store.js";
import { ask, get, post } from "./stream.js";
import { sayAll, setLanguage, word } from "./words.js";

const $ = (id) => document.getElementById(id);
const SETTINGS = ["model", "beside", "effort", "budget", "glass"];
const EFFORTS = ["auto", "none", "low", "high", "max"];

let conversations = [];
let current = store.begin();
let models = new Map();
let running = null; // {stop, ids}: an answer on its way

function make(tag, properties = {}, ...children) {
  const { label, ...own } = properties;
  const element = Object.assign(document.createElement(tag), own);
  if (label) element.setAttribute("aria-label", label);
  element.append(...children.filter((child) => child != null));
  return element;
}

const button = (text, act, properties = {}) => make("button", { type: "button", textContent: text, onclick: act, ...properties });

// What is asked

function messagesFor(leaf, model) {
  const said = store.path(current, leaf).filter((node) => !node.error);
  const turns = models.get(model)?.single_turns ? said.slice(-1) : said;
  return turns.map(({ role, content, reasoning }) => (reasoning ? { role, content, reasoning_content: reasoning } : { role, content }));
}

function bodyFor(node) {
  const { effort, budget, glass, seed, model } = node.asked;
  const body = { model, messages: messagesFor(node.parent, model), seed };
  if (effort !== "auto") body.reasoning_effort = effort;
  if (budget) body.thinking = { type: "enabled", budget_tokens: budget };
  if (glass) Object.assign(body, { logprobs: true, top_logprobs: 5, glass: true });
  return body;
}

const asking = (model) => ({
  model,
  effort: $("effort").value,
  budget: Number($("budget").value) || 0,
  glass: $("glass").checked,
  seed: crypto.getRandomValues(new Uint32Array(1))[0] >>> 1,
});

function tokensOf(choice) {
  const told = choice.logprobs ?? {};
  const experts = choice.glass?.experts ?? [];
  return ["reasoning_content", "content"].flatMap((name) =>
    (told[name] ?? []).map((token, place) => ({
      text: token.token,
      logprob: token.logprob,
      kind: name === "content" ? "content" : "reasoning",
      top: token.top_logprobs.map((other) => [other.token, other.logprob]),
      experts: experts[place] ?? [],
    })));
}

async function answer(node, controller) {
  const begun = performance.now();
  Object.assign(node, { content: "", reasoning: "", tokens: node.asked.glass ? [] : undefined, unfinished: true, error: undefined });
  try {
    for await (const chunk of ask(bodyFor(node), controller.signal)) {
      node.request = chunk.id;
      for (const choice of chunk.choices) {
        node.first ??= performance.now() - begun;
        node.reasoning += choice.delta.reasoning_content ?? "";
        if (choice.delta.content) node.thought ??= performance.now() - begun;
        node.content += choice.delta.content ?? "";
        node.tokens?.push(...tokensOf(choice));
        node.finish = choice.finish_reason ?? node.finish;
      }
      if (chunk.usage) Object.assign(node, { usage: chunk.usage, seconds: (performance.now() - begun) / 1000 });
      show(node);
    }
  } catch (error) {
    if (controller.signal.aborted) node.finish = "stopped";
    else node.error = error instanceof TypeError ? word("fails") : error.message;
  }
  node.thought ??= performance.now() - begun;
  node.unfinished = false;
}

// Run answers side by side until all are whole.
async function run(nodes) {
  const controller = new AbortController();
  running = { stop: () => controller.abort(), nodes };
  draw();
  await store.put(current);
  const saving = setInterval(() => store.put(current), 1000);
  await Promise.all(nodes.map((node) => answer(node, controller)));
  clearInterval(saving);
  running = null;
  current.updated = Date.now();
  await store.put(current);
  conversations = await store.all();
  draw();
  $("question").focus();
}

async function send(text, parent) {
  if (running || !text.trim()) return;
  current.leaf = parent;
  current.title ||= text.trim().slice(0, 80);
  const question = store.add(current, { role: "user", content: text });
  await reply(question.id);
}

async function reply(parent) {
  current.leaf = parent;
  const first = store.add(current, { role: "assistant", asked: asking($("model").value) });
  const nodes = [first];
  if ($("beside").value) {
    nodes.push(store.add(current, { role: "assistant", parent, besides: first.id, asked: { ...first.asked, model: $("beside").value } }));
    current.leaf = first.id;
  }
  await run(nodes);
}

// The same question with the same seed: the same tokens, with all that is known of them.
async function lookInside(node) {
  node.asked = { ...node.asked, glass: true };
  $("note").textContent = word("again_inside");
  await run([node]);
  $("note").textContent = "";
}

// What is shown

function reasoningOf(node) {
  if (!node.reasoning) return null;
  const thinking = node.unfinished && !node.content;
  const seconds = ((node.thought ?? 0) / 1000).toFixed(1);
  const tokens = node.usage?.completion_tokens_details.reasoning_tokens;
  const told = thinking ? word("thinking") : word("thought", seconds, tokens ?? "?");
  const open = node.open ?? thinking;
  const block = make("details", { className: `reasoning${thinking ? " working" : ""}`, open },
    make("summary", { textContent: told }), make("div", { className: "said", textContent: node.reasoning }));
  block.querySelector("summary").addEventListener("click", () => (node.open = !block.open));
  return block;
}

function costOf(node) {
  const price = models.get(node.asked?.model)?.price;
  if (!price || !node.usage) return 0;
  const { prompt_cache_hit_tokens: hit, prompt_cache_miss_tokens: miss, completion_tokens: output } = node.usage;
  return (hit * price.cache_hit + miss * price.cache_miss + output * price.output) / 1e6;
}

function statisticsOf(node) {
  if (!node.usage || !node.seconds) return node.finish === "stopped" ? word("stopped") : "";
  const count = node.usage.completion_tokens;
  const speed = (count / node.seconds).toFixed(count / node.seconds < 10 ? 1 : 0);
  const parts = [word("rate", count, speed, ((node.first ?? 0) / 1000).toFixed(2))];
  if (node.usage.prompt_cache_hit_tokens) parts.push(word("cached", node.usage.prompt_cache_hit_tokens));
  if (node.finish === "length") parts.push(word("cut"));
  return parts.join(", ");
}

function versionsOf(node) {
  const versions = store.siblings(current, node);
  const place = versions.indexOf(node);
  if (versions.length < 2 || running) return [];
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

function answerOf(node) {
  const text = make("div", { className: "text" });
  text.innerHTML = markdown(node.content);
  const tools = make("div", { className: "tools" });
  if (!node.unfinished) {
    tools.append(...versionsOf(node), button(word("copy"), () => navigator.clipboard.writeText(node.content)),
      button(word("again"), () => !running && reply(node.parent)));
    const inside = node.tokens?.length ? () => ((node.shown = !node.shown), show(node)) : () => !running && lookInside(node).then(() => ((node.shown = true), show(node)));
    tools.append(button(word("look"), inside, { title: word("opened"), className: "look" }), make("span", { textContent: statisticsOf(node) }));
  } else if (!running?.nodes.includes(node)) {
    tools.append(make("span", { textContent: word("unfinished") }), button(word("resume"), () => !running && run([node])));
  }
  return make("div", { className: "answer", id: `node-${node.id}` },
    make("div", { className: "who", textContent: node.asked.model }), reasoningOf(node), text,
    node.error ? make("p", { className: "bad", textContent: node.error }) : null, tools,
    node.shown && node.tokens?.length ? glassBox(node.tokens) : null);
}

function questionOf(node) {
  const turn = make("div", { className: "turn user" });
  const edit = () => {
    const area = make("textarea", { value: node.content, rows: 3, label: word("edit") });
    turn.replaceChildren(area, make("div", { className: "tools" },
      button(word("save"), () => send(area.value, node.parent)), button(word("cancel"), draw)));
    area.focus();
  };
  turn.append(make("div", { className: "text", textContent: node.content }),
    make("div", { className: "tools" }, ...versionsOf(node), running ? null : button(word("edit"), edit)));
  return turn;
}

function show(node) {
  const thread = $("thread");
  const low = thread.scrollHeight - thread.scrollTop - thread.clientHeight < 60;
  document.getElementById(`node-${node.id}`)?.replaceWith(answerOf(node));
  if (low) thread.scrollTop = thread.scrollHeight;
}

function hello() {
  const about = models.get($("model").value) ?? {};
  const example = about.example && button(about.example, () => send(about.example, null));
  return make("div", { className: "hello" }, make("h2", { textContent: $("model").value }),
    about.single_turns ? make("p", { className: "muted", textContent: word("prompt") }) : null,
    example ? make("p", {}, `${word("example")} `, example) : null);
}

function draw() {
  const nodes = store.path(current);
  const turns = nodes.map((node) => {
    if (node.role === "user") return questionOf(node);
    const beside = Object.values(current.nodes).find((other) => other.besides === node.id);
    return make("div", { className: `turn${beside ? " pair" : ""}` }, answerOf(node), beside ? answerOf(beside) : null);
  });
  $("thread").replaceChildren(...(turns.length ? turns : [hello()]));
  $("thread").scrollTop = $("thread").scrollHeight;
  $("send").hidden = Boolean(running);
  $("stop").hidden = $("now").hidden = !running;
  const cost = Object.values(current.nodes).reduce((sum, node) => sum + costOf(node), 0);
  $("price").textContent = cost ? word("price", `$${cost.toPrecision(2)}`) : "";
  drawList();
}

function drawList() {
  const wanted = $("search").value.toLowerCase();
  const holds = (it) => !wanted || it.title.toLowerCase().includes(wanted) || Object.values(it.nodes).some((node) => node.content.toLowerCase().includes(wanted));
  $("list").replaceChildren(...conversations.filter(holds).map((it) => {
    const name = button(it.title, () => open(it), { title: it.title });
    name.setAttribute("aria-current", String(it.id === current.id));
    return make("div", {}, name, button("×", () => drop(it), { className: "remove", label: `${word("remove")}: ${it.title}` }));
  }));
}

function open(conversation) {
  running?.stop();
  current = conversation;
  localStorage.setItem("open", conversation.id);
  $("side").classList.remove("open");
  draw();
}

async function drop(conversation) {
  if (!confirm(word("confirm"))) return;
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
    if (event.key === "Escape") running?.stop();
    if (event.ctrlKey && event.key.toLowerCase() === "k") {
      event.preventDefault();
      $("side").classList.add("open");
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
  $("menu").onclick = () => $("menu").setAttribute("aria-expanded", $("side").classList.toggle("open"));
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

async function loadModels() {
  try {
    models = new Map((await get("v1/models")).data.map((model) => [model.id, model]));
  } catch (error) {
    if (error.status !== 401) throw error;
    const key = prompt(error.message);
    if (!key) throw error;
    localStorage.setItem("key", key.trim());
    return loadModels();
  }
}

async function begin() {
  setTheme(localStorage.getItem("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
  sayAll();
  listen();
  try {
    await loadModels();
  } catch (error) {
    $("note").textContent = error.message;
  }
  fillChoices();
  conversations = await store.all();
  const last = conversations.find((it) => it.id === localStorage.getItem("open"));
  if (last) current = last;
  draw();
}

begin();
