// What is asked of the server for an answer, and what its chunks add to it.

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
    })));
}

// begun: when it was asked, milliseconds since 1970
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

// What it cost, by its model's card.
export function costOf(node, price) {
  if (!price || !node.usage) return 0;
  const { prompt_cache_hit_tokens: hit, prompt_cache_miss_tokens: miss, completion_tokens: output } = node.usage;
  return (hit * price.cache_hit + miss * price.cache_miss + output * price.output) / 1e6;
}
