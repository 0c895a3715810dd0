// Requests to the server, and the events of an answer.

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export async function readModels(key) {
  const response = await reach("v1/models", { headers: headers(key) });
  return (await response.json()).data ?? [];
}

export async function* streamAnswer(body, key, signal) {
  // Yields {reasoning}, {content}, {call: {index, id, name, arguments}} (pieces), {finish}, {usage}.
  const response = await reach("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let ended = false;
  for await (const data of serverEvents(response.body)) {
    if (data === "[DONE]") {
      ended = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message ?? String(chunk.error));
    if (chunk.usage) yield { usage: chunk.usage };
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    const delta = choice.delta ?? {};
    const reasoning = delta.reasoning_content ?? delta.reasoning;
    if (reasoning) yield { reasoning };
    if (delta.content) yield { content: delta.content };
    for (const call of delta.tool_calls ?? []) {
      yield { call: { index: call.index, id: call.id, name: call.function?.name, arguments: call.function?.arguments ?? "" } };
    }
    if (choice.finish_reason) yield { finish: choice.finish_reason };
  }
  if (!ended) throw new ServerError("the connection ended before the answer did");
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function reach(address, options) {
  let response;
  try {
    response = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("the server cannot be reached");
  }
  if (response.ok) return response;
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message ?? message;
  } catch {
    // No body in our form: the status has to do.
  }
  throw new ServerError(message, response.status);
}

async function* serverEvents(stream) {
  // The data of each server-sent event. Comments and other fields are left out.
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  let lines = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      held += value;
      const complete = held.split("\n");
      held = complete.pop();
      for (const line of complete) {
        const text = line.endsWith("\r") ? line.slice(0, -1) : line;
        if (text.startsWith("data:")) lines.push(text.slice(text[5] === " " ? 6 : 5));
        else if (text === "" && lines.length) {
          yield lines.join("\n");
          lines = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
