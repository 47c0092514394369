// Asks the server, event by event.
//   for await (const chunk of ask(body, signal)) ...      chunks of /v1/chat/completions, parsed

const key = () => localStorage.getItem("key");

const headers = () => ({ "Content-Type": "application/json", ...(key() ? { Authorization: `Bearer ${key()}` } : {}) });

async function refuse(response) {
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // no body that says more
  }
  throw Object.assign(new Error(message), { status: response.status, later: Number(response.headers.get("Retry-After")) });
}

export async function get(path) {
  const response = await fetch(path, { headers: headers() });
  if (!response.ok) await refuse(response);
  return response.json();
}

export async function post(path, body) {
  const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body) });
  if (!response.ok) await refuse(response);
  return response.json();
}

// An answer that runs on for a while when the page is left.
export function ask(body, signal) {
  const whole = JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } });
  return chunksOf("v1/chat/completions", { method: "POST", headers: { ...headers(), "X-Resumable": "1" }, body: whole, signal });
}

// What of it came behind the first chunks.
export const askOn = (id, after, signal) => chunksOf(`v1/chat/completions/${id}/events?after=${after}`, { headers: headers(), signal });

async function* chunksOf(path, request) {
  const response = await fetch(path, request);
  if (!response.ok) await refuse(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new TypeError("the connection ended before the answer did");
    const lines = (held + value).split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (!line.startsWith("data: ")) continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}
