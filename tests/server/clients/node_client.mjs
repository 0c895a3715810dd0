// The `openai` package of npm against a server: node node_client.mjs URL MODEL
import assert from "node:assert";
import OpenAI from "openai";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url.replace(/\/+(v1\/?)?$/, "") + "/v1", apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of Norway?" }];
const given = { model, messages, max_tokens: 64, enable_thinking: true };

const whole = await client.chat.completions.create(given);
assert.equal(whole.choices[0].message.role, "assistant");

const seen = { reasoning: "", content: "", usage: null };
for await (const chunk of await client.chat.completions.create({ ...given, stream: true, stream_options: { include_usage: true } })) {
  const delta = chunk.choices[0]?.delta ?? {};
  seen.reasoning += delta.reasoning_content ?? "";
  seen.content += delta.content ?? "";
  seen.usage = chunk.usage ?? seen.usage;
}
assert(seen.reasoning + seen.content);
assert.equal(seen.usage.total_tokens, seen.usage.prompt_tokens + seen.usage.completion_tokens);

const parameters = { type: "object", properties: { n: { type: "integer" } }, required: ["n"], additionalProperties: false };
const tools = [{ type: "function", function: { name: "square", parameters } }];
const stream = client.chat.completions.stream({ model, messages, tools, tool_choice: "required", max_tokens: 400 });
const [call] = (await stream.finalChatCompletion()).choices[0].message.tool_calls;
assert(Number.isInteger(JSON.parse(call.function.arguments).n));

let last = null;
for await (const event of await client.responses.create({ model, input: messages[0].content, stream: true, max_output_tokens: 64 })) last = event;
assert(["response.completed", "response.incomplete"].includes(last.type));

const controller = new AbortController();
for await (const _ of await client.chat.completions.create({ ...given, max_tokens: 4000, stream: true }, { signal: controller.signal })) {
  controller.abort();
  break;
}
await assert.rejects(client.chat.completions.create({ ...given, model: "absent" }), (error) => error.status === 404);
console.log("chat, stream, a forced call, responses, abort, 404");
