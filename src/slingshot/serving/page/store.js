// Conversations, kept in this browser alone (IndexedDB). A conversation is a tree of messages: an edit or a second try
// is a sibling, and `leaf` says which branch is shown.
//   {id, title, created, updated, leaf, nodes: {id: {id, parent, role, content, reasoning, ...}}}

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

export const all = async () => (await act("readonly", (store) => store.getAll())).sort((a, b) => b.updated - a.updated);
export const put = (conversation) => act("readwrite", (store) => store.put(conversation));
export const remove = (id) => act("readwrite", (store) => store.delete(id));

export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");

export function begin() {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, leaf: null, nodes: {} };
}

export function add(conversation, node) {
  const whole = { id: newId(), parent: conversation.leaf, content: "", ...node };
  conversation.nodes[whole.id] = whole;
  conversation.leaf = whole.id;
  conversation.updated = Date.now();
  return whole;
}

// From the first message to the leaf.
export function path(conversation, leaf = conversation.leaf) {
  const found = [];
  for (let node = conversation.nodes[leaf]; node; node = conversation.nodes[node.parent]) found.unshift(node);
  return found;
}

// Versions of a message: the children of its parent, but for answers that stand beside another.
export const siblings = (conversation, node) =>
  Object.values(conversation.nodes).filter((other) => other.parent === node.parent && !other.besides);

// The newest message below a node.
export function lastBelow(conversation, id) {
  const children = Object.values(conversation.nodes).filter((node) => node.parent === id && !node.besides);
  return children.length ? lastBelow(conversation, children.at(-1).id) : id;
}

// Conversations from a file that this page wrote; throws where it is none.
export function parse(text) {
  const given = JSON.parse(text).conversations;
  const whole = (it) => typeof it?.id === "string" && typeof it.nodes === "object" && typeof it.title === "string";
  if (!Array.isArray(given) || !given.every(whole)) throw new Error("not a file of conversations");
  return given;
}
