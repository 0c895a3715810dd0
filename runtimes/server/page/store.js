// What this browser keeps: conversations, each under a key of its own, and settings. What cannot be read is left alone.

const CONVERSATION = "qwen-export.conversation.";
const SETTINGS = "qwen-export.settings";
const KEY = "qwen-export.key";

export const DEFAULTS = { model: "", system: "", thinking: "auto", temperature: "", max_tokens: "", tools: "", theme: "auto" };

// A browser may refuse both; then nothing outlives the page.
const local = storageOf("localStorage");
const session = storageOf("sessionStorage");

function storageOf(name) {
  try {
    window[name].length;
    return window[name];
  } catch {
    const kept = new Map();
    return {
      get length() {
        return kept.size;
      },
      key: (i) => [...kept.keys()][i],
      getItem: (key) => kept.get(key) ?? null,
      setItem: (key, value) => kept.set(key, value),
      removeItem: (key) => kept.delete(key),
    };
  }
}

function read(storage, key) {
  try {
    return JSON.parse(storage.getItem(key));
  } catch {
    return null;
  }
}

function write(storage, key, value) {
  try {
    storage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false; // the storage is full, or there is none
  }
}

export function readSettings() {
  const stored = read(local, SETTINGS);
  const settings = { ...DEFAULTS };
  for (const name of Object.keys(DEFAULTS)) if (typeof stored?.[name] === "string") settings[name] = stored[name];
  return settings;
}

export function writeSettings(settings) {
  return write(local, SETTINGS, settings);
}

export function readKey() {
  const key = read(session, KEY);
  return typeof key === "string" ? key : "";
}

export function writeKey(key) {
  return write(session, KEY, key);
}

export function newConversation() {
  return { id: `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 8)}`, title: "", changed: Date.now(), messages: [] };
}

export function readConversations() {
  // The last changed one first.
  const found = [];
  for (let i = 0; i < local.length; i += 1) {
    const key = local.key(i);
    const value = key.startsWith(CONVERSATION) ? read(local, key) : null;
    if (isConversation(value) && key === CONVERSATION + value.id) found.push(value);
  }
  return found.sort((a, b) => b.changed - a.changed);
}

export function readConversation(id) {
  const value = read(local, CONVERSATION + id);
  return isConversation(value) ? value : null;
}

function isConversation(value) {
  const whole = value && typeof value.id === "string" && typeof value.changed === "number" && Array.isArray(value.messages);
  return Boolean(whole) && value.messages.every((message) => message && typeof message.role === "string");
}

export function writeConversation(conversation) {
  // Without its images, where there is no room for them.
  conversation.changed = Date.now();
  const key = CONVERSATION + conversation.id;
  return write(local, key, conversation) || write(local, key, withoutImages(conversation));
}

function withoutImages(conversation) {
  const messages = conversation.messages.map((message) =>
    Array.isArray(message.content) ? { ...message, content: message.content.filter((part) => part.type === "text") } : message,
  );
  return { ...conversation, messages };
}

export function deleteConversation(id) {
  local.removeItem(CONVERSATION + id);
}

export function isConversationKey(key) {
  return key === null || key.startsWith(CONVERSATION);
}
