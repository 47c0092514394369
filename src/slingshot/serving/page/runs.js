// Answers on their way. They go on whatever is shown: another branch, another conversation.

import { take } from "./chunks.js";
import { note } from "./dom.js";
import { failureOf } from "./door.js";
import * as store from "./store.js";
import { ask, askOn, post } from "./stream.js";
import { word } from "./words.js";

/** @typedef {import("./store.js").Conversation} Conversation */
/** @typedef {import("./store.js").Message} Message */
/** @typedef {{conversation: Conversation, nodes: Message[], stop: () => void, save: () => Promise<void>}} Run answers that began together */

const control = "v1/chat/completions/control";
const CONNECTIONS = 3; // how often a connection that breaks is sought again, a second later each time
/** @type {Set<Run>} */
const runs = new Set();

/** @param {Message} node @returns {Run | undefined} */
export const runOf = (node) => [...runs].find((run) => run.nodes.includes(node));

/** @param {Conversation} conversation @returns {Run[]} */
export const runsOf = (conversation) => [...runs].filter((run) => run.conversation === conversation);

/** The conversation of this id as it grows, where it does. @param {string} id */
export const growing = (id) => [...runs].find((run) => run.conversation.id === id)?.conversation;

export const saveAll = () => runs.forEach((run) => run.save());

/** Let the run's answers end their reasoning. @param {Run | undefined} run */
export async function answerNow(run) {
  const asked = (run?.nodes ?? []).filter((node) => node.request);
  await Promise.all(asked.map((node) => post(control, { id: node.request, action: "reasoning_end" }).catch(() => {})));
}

const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

function beginAnew(node) {
  const fresh = { content: "", reasoning: "", unfinished: true, begun: Date.now(), chunks: 0, tokens: node.asked.glass ? [] : undefined };
  for (const name of ["error", "first", "thought", "finish", "usage", "seconds", "request", "prompt"]) fresh[name] = undefined;
  Object.assign(node, fresh);
}

// goesOn: behind the chunks that came before a reload, or before the connection broke.
async function answer(node, signal, { bodyOf, grew }, save, goesOn) {
  if (!goesOn) beginAnew(node);
  for (let left = CONNECTIONS; ; left--) {
    try {
      const chunks = goesOn ? askOn(node.request, node.chunks, signal) : ask(bodyOf(node), signal);
      for await (const chunk of chunks) {
        const name = node.request;
        take(node, chunk, node.begun);
        if (node.request !== name) save(); // by its name a reload finds it again
        grew(node);
      }
      break;
    } catch (error) {
      if (signal.aborted) {
        node.finish = "stopped";
        break;
      }
      if (goesOn && error.status === 404) { // it is kept for a while only
        node.request = undefined;
        return;
      }
      if (error instanceof TypeError && node.request && left) {
        goesOn = true;
        await pause(1000);
        continue;
      }
      node.error = failureOf(error);
      break;
    }
  }
  node.thought ??= Date.now() - node.begun;
  node.unfinished = false;
}

/**
 * Run answers side by side until all are whole.
 * @param {Conversation} conversation
 * @param {Message[]} nodes
 * @param {{bodyOf: (node: Message) => object, grew: (node: Message) => void, settled: (node: Message) => void}} told
 *   bodyOf: what is asked for an answer
 * @param {boolean} goesOn where it was lost, by a reload
 * @returns {Promise<void>}
 */
export async function run(conversation, nodes, told, goesOn) {
  const controller = new AbortController();
  const save = async () => void (conversation.dropped || (await store.put(conversation).catch(() => note(word("full")))));
  const stop = () => {
    controller.abort();
    for (const { request: id } of nodes) if (id) post(control, { id, action: "stop" }).catch(() => {});
  };
  const its = { conversation, nodes, stop, save };
  runs.add(its);
  const answers = nodes.map((node) => answer(node, controller.signal, told, save, goesOn).then(() => told.settled(node)));
  const keepSaving = async () => {
    while (runs.has(its)) {
      const began = performance.now();
      await save();
      await pause(500 + 10 * (performance.now() - began)); // the longer the conversation, the more seldom
    }
  };
  keepSaving();
  await Promise.all(answers);
  runs.delete(its);
  conversation.updated = Date.now();
  await save();
}
