// The page: what the worker reports becomes progress, text and a line of numbers.

const find = (selector) => document.querySelector(selector);
const [form, question, log, status, bar, send, stop] = ["#form", "#question", "#log", "#status", "#progress", "#send", "#stop"].map(find);
const worker = new Worker("worker.js", { type: "module" });
const messages = [];
let view = null; // the answer that is being made

const megabytes = (bytes) => (bytes / 1e6).toFixed(1);

function show(text, fraction) {
  status.textContent = text;
  bar.hidden = fraction === undefined;
  if (fraction === null) bar.removeAttribute("value");
  else if (fraction !== undefined) bar.value = fraction;
}

function entry(kind, text) {
  const element = log.appendChild(document.createElement("article"));
  element.className = kind;
  element.textContent = text;
  element.scrollIntoView({ block: "end" });
  return element;
}

function busy(is) {
  send.hidden = is;
  stop.hidden = !is;
  log.setAttribute("aria-busy", String(is));
  if (!is) view = null;
}

const handlers = {
  progress({ done, total, opening }) {
    if (opening) show("Opening the graphs", null);
    else show(`Loading ${megabytes(done)} of ${megabytes(total)} MB`, done / total);
  },
  ready({ precision, context, provider, threads, chats }) {
    const on = provider === "wasm" ? `${threads} ${threads === 1 ? "thread" : "threads"}` : "GPU";
    show(`${precision}, ${context} tokens of context, ${provider}, ${on}`);
    form.elements.chat.disabled = !chats;
    send.disabled = false;
    question.focus();
  },
  prompt({ read, total }) {
    show(`Reading the prompt: ${read} of ${total} tokens`, read / total);
  },
  piece(text) {
    bar.hidden = true;
    view.textContent += text;
    view.scrollIntoView({ block: "end" });
  },
  done({ finish, tokens, promptTokens, promptSeconds, seconds }) {
    const rate = tokens.length > 1 ? `, ${(tokens.length / seconds).toFixed(1)} per second` : "";
    show(`${tokens.length} tokens${rate}; prompt of ${promptTokens} in ${promptSeconds.toFixed(2)} s; ${finish}`);
    messages.push({ role: "assistant", content: view.textContent });
    busy(false);
  },
  problem(text) {
    show("");
    entry("problem", text).setAttribute("role", "alert");
    if (view) messages.pop();
    busy(false);
  },
};

worker.onmessage = ({ data }) => {
  for (const [name, value] of Object.entries(data)) handlers[name](value);
};
worker.onerror = (event) => handlers.problem(event.message ?? "The worker could not start: run npm install in the page's folder.");

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value;
  if (!text.trim() || send.disabled || send.hidden) return;
  const { chat, thinking, temperature, most } = form.elements;
  const chats = chat.checked && !chat.disabled;
  question.value = "";
  entry("own", text);
  view = entry("answer", chats ? "" : text);
  messages.push({ role: "user", content: text });
  busy(true);
  const prompt = chats ? messages : text;
  worker.postMessage({ ask: { prompt, thinking: thinking.checked, temperature: Number(temperature.value), most: Number(most.value) } });
});

question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
stop.addEventListener("click", () => worker.postMessage({ stop: true }));
find("#new").addEventListener("click", () => {
  if (view) return;
  messages.length = 0;
  log.replaceChildren();
});

const asked = new URLSearchParams(location.search);
show("Loading", null);
worker.postMessage({ load: new URL(asked.get("bundle") ?? "bundle/", location.href).href, provider: asked.get("provider") ?? "wasm" });
