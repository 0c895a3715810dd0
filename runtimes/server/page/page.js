// The page: one conversation at a time, its list, and the composer.

import { AnswerState, isEmpty } from "./answer_state.js";
import { readModels, streamAnswer, ServerError } from "./answer_stream.js";
import { showConversations } from "./conversation_list.js";
import { byId, element, say } from "./elements.js";
import { Attachments } from "./images.js";
import { MessageView, textOf } from "./message_view.js";
import { openSettings, toolsOf } from "./settings_dialog.js";
import * as store from "./store.js";
import { resultsForm } from "./tool_results.js";

const page = {
  settings: store.readSettings(),
  key: store.readKey(),
  models: [],
  conversations: store.readConversations(),
  current: store.newConversation(),
  running: null, // {controller, view} of the answer that is being made
  last: null, // the view of the last answer, which can be made again
};
const LOADING = "The server is still loading the model.";
const log = byId("log");
const question = byId("question");
const images = new Attachments(problem);

// Conversations

function openConversation(conversation) {
  stop();
  page.current = conversation;
  byId("title").textContent = conversation.title || "New conversation";
  document.title = conversation.title || "Chat";
  log.replaceChildren(...(conversation.messages.length ? [] : [greeting()]));
  const views = conversation.messages.map(showMessage);
  offerNext(views[views.length - 1]);
  follow();
  problem("");
  listConversations();
}

function greeting() {
  const name = model()?.id ?? "the model";
  return element("p", { className: "greeting", textContent: `Ask ${name} something. Conversations stay in this browser.` });
}

function listConversations() {
  showConversations(page.conversations, page.current.id, {
    open: (conversation) => {
      closeMenu();
      openConversation(store.readConversation(conversation.id) ?? conversation);
      question.focus();
    },
    remove: (conversation) => {
      if (!confirm(`Delete “${conversation.title}”?`)) return;
      store.deleteConversation(conversation.id);
      page.conversations = page.conversations.filter((other) => other.id !== conversation.id);
      if (conversation.id === page.current.id) openConversation(store.newConversation());
      else listConversations();
      byId("new").focus();
      say("Deleted");
    },
  });
}

function save() {
  const { current } = page;
  if (!current.title) current.title = textOf(current.messages[0]).trim().replace(/\s+/g, " ").slice(0, 60) || "Untitled";
  if (!store.writeConversation(current)) problem("This browser has no room left: the conversation is not kept. Delete others.");
  page.conversations = [current, ...page.conversations.filter((other) => other.id !== current.id)];
  byId("title").textContent = current.title;
  document.title = current.title;
  listConversations();
}

function download() {
  const { settings } = page;
  const system = settings.system ? [{ role: "system", content: settings.system }] : [];
  const body = JSON.stringify({ messages: [...system, ...page.current.messages.map(asSent)] }, null, 1);
  const link = element("a", { href: URL.createObjectURL(new Blob([body], { type: "application/json" })), download: "conversation.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// Messages

function showMessage(message) {
  const view = new MessageView(message);
  log.querySelector(".greeting")?.remove();
  log.append(view.root);
  return view;
}

function offerNext(view) {
  // Behind the last answer: to make it again, or to give the results of its calls.
  log.querySelector(".results")?.remove();
  if (page.last?.again) {
    page.last.again = null;
    page.last.update(false);
  }
  page.last = view;
  const message = view?.message;
  if (message?.role !== "assistant") return;
  view.again = () => {
    page.current.messages.pop();
    page.last = null;
    view.root.remove();
    question.focus();
    answer();
  };
  view.update(false);
  if (message.tool_calls?.length && message.finish === "tool_calls") {
    log.append(
      resultsForm(message.tool_calls, (results) => {
        for (const result of results) {
          page.current.messages.push(result);
          showMessage(result);
        }
        answer();
      }),
    );
  }
}

function asSent(message) {
  const names = ["role", "content", "reasoning_content", "tool_calls", "tool_call_id"];
  return Object.fromEntries(names.filter((name) => message[name] !== undefined).map((name) => [name, message[name]]));
}

function requestBody() {
  const { settings } = page;
  const system = settings.system ? [{ role: "system", content: settings.system }] : [];
  const body = { messages: [...system, ...page.current.messages.filter((message) => !isEmpty(message)).map(asSent)] };
  if (model()) body.model = model().id;
  if (settings.temperature !== "") body.temperature = Number(settings.temperature);
  if (settings.max_tokens !== "") body.max_tokens = Number(settings.max_tokens);
  if (settings.thinking !== "auto") body.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  const tools = toolsOf(settings.tools);
  if (tools?.length) body.tools = tools;
  return body;
}

// Answers

async function answer() {
  const body = requestBody();
  const message = { role: "assistant", content: "" };
  page.current.messages.push(message);
  const view = showMessage(message);
  offerNext(null);
  const conversation = page.current;
  const running = { controller: new AbortController(), view };
  page.running = running;
  showRunning(true);
  say("Answering");
  view.update(true);
  const draw = drawing(view);
  const state = new AnswerState(message);
  let failure = "";
  try {
    for await (const event of streamAnswer(body, page.key, running.controller.signal)) {
      state.take(event);
      draw.soon();
    }
  } catch (error) {
    if (error.name === "AbortError") message.problem = "stopped";
    else failure = error instanceof ServerError ? error.message : `the answer cannot be read: ${error.message}`;
    if (error.status === 401) settings();
  } finally {
    draw.end();
    const near = isNearEnd();
    page.running = page.running === running ? null : page.running;
    message.figures = state.figures();
    if (failure) message.problem = failure;
    else if (message.finish === "length") message.problem = "cut off at the limit of tokens";
    view.update(false);
    if (conversation === page.current) ended(view, failure, near);
    else store.writeConversation(conversation);
  }
}

function ended(view, failure, near) {
  const { message } = view;
  showRunning(false);
  if (isEmpty(message) && failure) {
    page.current.messages.pop();
    view.root.remove();
    problem(failure);
    // The question goes back into the composer, to be sent again.
    const last = page.current.messages[page.current.messages.length - 1];
    if (last?.role === "user") {
      page.current.messages.pop();
      log.lastElementChild?.remove();
      if (!question.value) question.value = textOf(last);
      grow();
    }
    if (page.current.messages.length) save();
    return;
  }
  save();
  offerNext(view);
  follow(near);
  say(failure || (message.tool_calls?.length ? "The model calls a function" : `Answer: ${message.content || "none"}`));
}

function drawing(view) {
    let asked = 0;
  return {
    soon() {
      asked ||= requestAnimationFrame(() => {
        asked = 0;
        const near = isNearEnd();
        view.update(true);
        follow(near);
      });
    },
    end() {
      cancelAnimationFrame(asked);
    },
  };
}

function isNearEnd() {
  return log.scrollHeight - log.scrollTop - log.clientHeight < 80;
}

function follow(wanted = true) {
  if (wanted) log.scrollTop = log.scrollHeight;
}

function stop() {
  page.running?.controller.abort();
}

function showRunning(running) {
  // The focus goes with the button that is exchanged.
  const [send, halt] = [byId("send"), byId("stop")];
  const focused = document.activeElement;
  send.disabled = send.hidden = running;
  halt.hidden = !running;
  if (running && focused === send) halt.focus();
  if (!running && focused === halt) question.focus();
}

function problem(text) {
  byId("problem").textContent = text;
  byId("problem").hidden = !text;
}

// The composer

function submit() {
  const text = question.value.trim();
  if (page.running || (!text && !images.urls.length)) return;
  problem("");
  const parts = images.take();
  const message = { role: "user", content: parts.length ? [...parts, { type: "text", text }] : text };
  page.current.messages.push(message);
  showMessage(message);
  question.value = "";
  grow();
  follow();
  save();
  answer();
}

function grow() {
  question.style.height = "auto";
  question.style.height = `${Math.min(question.scrollHeight + 2, 240)}px`;
}

// Settings and models

function model() {
  return page.models.find((found) => found.id === page.settings.model) ?? page.models[0];
}

function showModel() {
  const found = model();
  byId("model").textContent = found ? found.id : "";
  byId("attach").hidden = !found?.capabilities?.vision;
  const text = log.querySelector(".greeting");
  if (text) text.replaceWith(greeting());
}

async function loadModels() {
  let again = false;
  try {
    page.models = await readModels(page.key);
    again = !page.models.length;
    problem(again ? LOADING : "");
  } catch (error) {
    page.models = [];
    again = error.status === 503;
    problem(again ? LOADING : error.message);
    if (error.status === 401) settings();
  }
  showModel();
  if (again) setTimeout(loadModels, 2000);
}

function settings() {
  openSettings(page, {
    save(changed, key) {
      page.settings = changed;
      page.key = key;
      if (!store.writeSettings(changed)) problem("This browser does not keep the settings.");
      store.writeKey(key);
      theme();
      loadModels();
    },
    deleteAll() {
      for (const conversation of page.conversations) store.deleteConversation(conversation.id);
      page.conversations = [];
      openConversation(store.newConversation());
    },
  });
}

function theme() {
  document.documentElement.dataset.theme = page.settings.theme;
}

function menu(open) {
  byId("sidebar").classList.toggle("open", open);
  byId("shade").hidden = !open;
  byId("menu").setAttribute("aria-expanded", String(open));
  if (open) byId("new").focus();
}

function closeMenu() {
  if (byId("menu").getAttribute("aria-expanded") === "true") menu(false);
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
byId("stop").addEventListener("click", stop);
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
question.addEventListener("input", grow);
question.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
  if (files.length && !byId("attach").hidden) images.add(files);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || byId("settings").open) return;
  if (byId("menu").getAttribute("aria-expanded") === "true") {
    menu(false);
    byId("menu").focus();
  } else stop();
});
byId("new").addEventListener("click", () => {
  closeMenu();
  openConversation(store.newConversation());
  question.focus();
});
byId("menu").addEventListener("click", () => menu(byId("menu").getAttribute("aria-expanded") !== "true"));
byId("shade").addEventListener("click", closeMenu);
byId("download").addEventListener("click", download);
byId("open-settings").addEventListener("click", settings);
byId("attach").addEventListener("click", () => byId("files").click());
byId("files").addEventListener("change", (event) => {
  images.add([...event.target.files]).then(() => (event.target.value = ""));
});
addEventListener("storage", (event) => {
  // Another tab of this page.
  if (!store.isConversationKey(event.key)) return;
  page.conversations = store.readConversations();
  listConversations();
});

theme();
openConversation(page.current);
loadModels();
