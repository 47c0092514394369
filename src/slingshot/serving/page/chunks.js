// What is asked of the server for an answer, and what its chunks add to it.

/** @typedef {import("./store.js").Message} Message */

/** What the model is told before a message: all of its branch, or its question alone where models know single turns.
 * @param {Message[]} path @param {boolean} single @param {string} [system] */
export function messagesOf(path, single, system) {
  const said = path.filter((node) => !node.error);
  const turns = single ? said.slice(-1) : said;
  const first = system && !single ? [{ role: "system", content: system }] : [];
  return [...first, ...turns.map(({ role, content, reasoning }) => (reasoning ? { role, content, reasoning_content: reasoning } : { role, content }))];
}

/** @param {Message} node an answer @param {object[]} messages */
export function bodyFor(node, messages) {
  const { effort, budget, glass, seed, model } = node.asked;
  const body = { model, messages, seed };
  if (effort !== "auto") body.reasoning_effort = effort;
  if (budget) body.thinking = { type: "enabled", budget_tokens: budget };
  if (glass) Object.assign(body, { logprobs: true, top_logprobs: 5, glass: true });
  return body;
}

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
      drafted: choice.glass?.drafted?.[place] ?? false,
    })));
}

/** @param {Message} node @param {any} chunk of /v1/chat/completions @param {number} begun when it was asked, milliseconds since 1970 */
export function take(node, chunk, begun) {
  node.request = chunk.id;
  node.chunks += 1;
  for (const choice of chunk.choices) {
    node.first ??= Date.now() - begun;
    node.reasoning += choice.delta.reasoning_content ?? "";
    if (choice.delta.content) node.thought ??= Date.now() - begun;
    node.content += choice.delta.content ?? "";
    node.tokens?.push(...tokensOf(choice));
    node.finish = choice.finish_reason ?? node.finish;
  }
  if (chunk.usage) Object.assign(node, { usage: chunk.usage, seconds: (Date.now() - begun) / 1000 });
}

/** What it cost, to look inside too, by its model's card. @param {Message} node @param {any} price dollars per million @returns {number} */
export function costOf(node, price) {
  if (!price) return 0;
  return [node.usage, node.looked].filter(Boolean).reduce((sum, usage) => {
    const { prompt_cache_hit_tokens: hit, prompt_cache_miss_tokens: miss, completion_tokens: output } = usage;
    return sum + (hit * price.cache_hit + miss * price.cache_miss + output * price.output) / 1e6;
  }, 0);
}
