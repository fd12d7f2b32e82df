"use strict";
// What the browser keeps: conversations, settings and the key. Each conversation is an entry of its own, so that tabs do not
// overwrite each other's. Without storage, or when it is full, everything works until the page is closed.

const BASE = location.pathname.replace(/\/?$/, "/"); // of the routes: a proxy may serve us below a path
const PREFIX = `compiledllm ${BASE} `;
const CHAT = PREFIX + "chat ";
const MAX_TITLE_LENGTH = 80;

function newId() { return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join(""); }

function openStorage(name) {
  try { window[name].getItem(PREFIX); return window[name]; } catch { return null; } // the browser may forbid it
}

/** A small value by name; it stays in memory where it cannot be stored. */
class Values {
  constructor(storage) { this.storage = storage; this.memory = {}; }

  get(name) {
    try { return JSON.parse(this.storage.getItem(PREFIX + name)) ?? this.memory[name]; } catch { return this.memory[name]; }
  }

  set(name, value) {
    this.memory[name] = value;
    try { this.storage.setItem(PREFIX + name, JSON.stringify(value)); } catch { /* it stays in memory */ }
  }
}

const values = new Values(openStorage("localStorage"));
const secrets = new Values(openStorage("sessionStorage")); // of this tab

// -- conversations -------------------------------------------------------------------------------

const textOf = (value) => (typeof value === "string" ? value : "");
const countOf = (value) => (Number.isFinite(value) && value >= 0 ? value : undefined);
const listOf = (value) => (Array.isArray(value) ? value : []);

function newConversation(system = "") {
  return { id: newId(), title: "", created: Date.now(), changed: Date.now(), system, messages: [] };
}

/** A conversation of what a file or the storage holds, with known fields of known types only; null if it is none. */
function conversationOf(value) {
  if (!value || typeof value !== "object" || !Array.isArray(value.messages)) return null;
  const { id, title, created, changed, system, version } = value;
  const messages = value.messages.map(messageOf).filter(Boolean);
  return {
    id: /^[\da-f]{24}$/.test(id) ? id : newId(), title: textOf(title).slice(0, MAX_TITLE_LENGTH), system: textOf(system),
    created: countOf(created) ?? Date.now(), changed: countOf(changed) ?? Date.now(), version: textOf(version), messages,
  };
}

function messageOf(value) {
  if (!["user", "assistant", "tool"].includes(value?.role)) return null;
  const message = { role: value.role, content: textOf(value.content) };
  if (value.role === "tool") message.tool_call_id = textOf(value.tool_call_id);
  if (value.role !== "assistant") return message;
  const calls = listOf(value.tool_calls).map((call) => ({
    id: textOf(call?.id), type: "function",
    function: { name: textOf(call?.function?.name), arguments: textOf(call?.function?.arguments) },
  }));
  if (calls.length) message.tool_calls = calls;
  for (const name of ["reasoning", "ended"]) if (textOf(value[name])) message[name] = value[name];
  const figures = Object.entries(value.figures ?? {}).filter(([, count]) => countOf(count) !== undefined);
  if (figures.length) message.figures = Object.fromEntries(figures);
  return message;
}

/** The conversations, by id. heard(id): called when another tab has changed or deleted one. */
class Conversations {
  constructor(storage, heard) {
    this.storage = storage;
    this.byId = new Map();
    this.isFull = false;
    for (const key of this.keys()) this.read(key);
    addEventListener("storage", (event) => {
      if (event.storageArea !== storage || !event.key?.startsWith(CHAT)) return;
      const id = event.key.slice(CHAT.length);
      if (event.newValue === null) this.byId.delete(id);
      heard(id);
    });
  }

  keys() { return this.storage ? Object.keys(this.storage).filter((key) => key.startsWith(CHAT)) : []; }

  /** What the storage holds now; null if there is nothing that can be read. */
  stored(id) {
    try { return conversationOf(JSON.parse(this.storage.getItem(CHAT + id))); } catch { return null; }
  }

  read(key) {
    const conversation = this.stored(key.slice(CHAT.length));
    if (conversation) this.byId.set(conversation.id, conversation);
    return conversation;
  }

  list() { return [...this.byId.values()].sort((a, b) => b.changed - a.changed); }

  /** Keeps a conversation. If another tab has changed it in the meantime, this one becomes a copy beside it. */
  save(conversation) {
    const theirs = this.storage && this.stored(conversation.id);
    if (theirs && theirs.version !== conversation.version) {
      this.byId.set(theirs.id, theirs);
      Object.assign(conversation, { id: newId(), title: conversation.title.slice(0, MAX_TITLE_LENGTH - 7) + " (copy)" });
    }
    this.byId.set(conversation.id, conversation);
    if (!this.storage) return;
    const version = newId();
    try {
      this.storage.setItem(CHAT + conversation.id, JSON.stringify({ ...conversation, version }));
      conversation.version = version;
      this.isFull = false;
    } catch {
      this.isFull = true;
    }
  }

  remove(id) {
    this.byId.delete(id);
    try { this.storage.removeItem(CHAT + id); } catch { /* nothing was kept */ }
  }
}

// -- files ---------------------------------------------------------------------------------------

const SPEAKERS = { user: "User", assistant: "Assistant", tool: "Tool" };

function asMarkdown(conversation) {
  const parts = ["# " + (conversation.title || "Chat")];
  if (conversation.system) parts.push("## System", conversation.system);
  for (const { role, content, reasoning, tool_calls: calls = [] } of conversation.messages) {
    parts.push("## " + SPEAKERS[role]);
    if (reasoning) parts.push(reasoning.replace(/^/gm, "> "));
    if (content) parts.push(content);
    for (const call of calls) parts.push(fenced(`${call.function.name}(${call.function.arguments})`));
  }
  return parts.join("\n\n") + "\n";
}

/** A code block whose fence is longer than any in the text. */
function fenced(text) {
  const longest = Math.max(2, ...(text.match(/`+/g) ?? []).map((run) => run.length));
  const fence = "`".repeat(longest + 1);
  return `${fence}\n${text}\n${fence}`;
}

function asJson(conversations) {
  return JSON.stringify({ conversations: conversations.map(({ version, ...rest }) => rest) }, null, 2);
}

/** The conversations of a file, with new ids. Throws if there are none. */
function conversationsOf(text) {
  const value = JSON.parse(text);
  const found = listOf(value?.conversations ?? [value]).map(conversationOf).filter(Boolean);
  if (!found.length) throw new SyntaxError("no conversations");
  return found.map((conversation) => ({ ...conversation, id: newId(), version: "" }));
}
