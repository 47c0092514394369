// Conversations, kept in this browser alone (IndexedDB). A conversation is a tree of messages: an edit or a second try
// is a sibling, and `leaf` says which branch is shown.

/**
 * @typedef {object} Message
 * @property {string} id
 * @property {string | null} parent
 * @property {"user" | "assistant"} role
 * @property {string} content
 * @property {string} [reasoning]
 * @property {{model: string, effort: string, budget: number, glass: boolean, seed: number}} [asked] how an answer was asked for
 * @property {string} [besides] the answer beside which this one stands
 * @property {boolean} [unfinished] it is on its way, or was lost there
 * @property {string} [request] its name at the server; `chunks`: how many of it came
 * @property {number} [chunks]
 * @property {number} [begun] when it was asked, milliseconds since 1970; until its first token and its answer: `first`, `thought`
 * @property {number} [first]
 * @property {number} [thought]
 * @property {number} [seconds] how long all of it took
 * @property {string} [finish] why it ended; `error`: what went wrong
 * @property {string} [error]
 * @property {object} [usage] as the API has it; `looked`: of the second time, to look inside
 * @property {object} [looked]
 * @property {import("./glass.js").Token[]} [tokens] what the glass box shows; `prompt`: the tokens before them
 * @property {string[]} [prompt]
 * @property {boolean} [open] whether its reasoning was folded out or in by hand; `shown`: whether the glass box is there
 * @property {boolean} [shown]
 */
/**
 * @typedef {object} Conversation
 * @property {string} id
 * @property {string} title
 * @property {number} created
 * @property {number} updated
 * @property {string | null} leaf
 * @property {Record<string, Message>} nodes
 * @property {string} [system] what the model is told of all of it
 * @property {boolean} [dropped] it was deleted, and is not to be kept
 */

const database = new Promise((resolve, reject) => {
  const opening = indexedDB.open("slingshot", 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore("conversations", { keyPath: "id" });
  opening.onsuccess = () => resolve(opening.result);
  opening.onerror = () => reject(opening.error);
});

async function act(mode, work) {
  const store = (await database).transaction("conversations", mode).objectStore("conversations");
  return new Promise((resolve, reject) => {
    const request = work(store);
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Newest first. @returns {Promise<Conversation[]>} */
export const all = async () => (await act("readonly", (store) => store.getAll())).sort((a, b) => b.updated - a.updated);
/** @param {Conversation} conversation */
export const put = (conversation) => act("readwrite", (store) => store.put(conversation));
/** @param {string} id */
export const remove = (id) => act("readwrite", (store) => store.delete(id));

export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");

/** @returns {Conversation} */
export function begin() {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, leaf: null, nodes: {} };
}

/** Behind the leaf, which it becomes. @param {Conversation} conversation @param {Partial<Message> & {role: Message["role"]}} node @returns {Message} */
export function add(conversation, node) {
  const whole = { id: newId(), parent: conversation.leaf, content: "", ...node };
  conversation.nodes[whole.id] = whole;
  conversation.leaf = whole.id;
  conversation.updated = Date.now();
  return whole;
}

/** From the first message to the leaf. @param {Conversation} conversation @returns {Message[]} */
export function path(conversation, leaf = conversation.leaf) {
  const found = [];
  for (let node = conversation.nodes[leaf]; node; node = conversation.nodes[node.parent]) found.unshift(node);
  return found;
}

/** Versions of a message: the children of its parent, but for answers that stand beside another.
 * @param {Conversation} conversation @param {Message} node @returns {Message[]} */
export const siblings = (conversation, node) =>
  Object.values(conversation.nodes).filter((other) => other.parent === node.parent && !other.besides);

/** The newest message below a node. @param {Conversation} conversation @param {string} id @returns {string} */
export function lastBelow(conversation, id) {
  const children = Object.values(conversation.nodes).filter((node) => node.parent === id && !node.besides);
  return children.length ? lastBelow(conversation, children.at(-1).id) : id;
}

const texts = (...values) => values.every((value) => typeof value === "string");

// Whether a message's parents lead to a first one, not in a circle.
function rooted(nodes, node) {
  for (let left = Object.keys(nodes).length; left && node; left--) {
    if (node.parent === null) return true;
    node = nodes[node.parent];
  }
  return false;
}

function isMessage(nodes, id) {
  const node = nodes[id];
  const whole = node?.id === id && texts(node.content) && rooted(nodes, node);
  return whole && (node.role === "user" || (node.role === "assistant" && texts(node.reasoning, node.asked?.model)));
}

const isConversation = (it) =>
  texts(it?.id, it?.title, it?.system ?? "") && it.nodes instanceof Object && Object.keys(it.nodes).every((id) => isMessage(it.nodes, id));

/** Conversations from a file that this page wrote; throws where it is none. @param {string} text @returns {Conversation[]} */
export function parse(text) {
  const given = JSON.parse(text).conversations;
  if (!Array.isArray(given) || !given.every(isConversation)) throw new Error("not a file of conversations");
  return given;
}
