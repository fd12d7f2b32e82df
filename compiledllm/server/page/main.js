"use strict";
// The page: which conversation is shown, what is asked, and what the reader's keys and buttons do.

const FIELDS = ["system", "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "reasoning_effort", "further"];
const POLL_MS = 3000;
const MAX_RENDER_SHARE = 0.2; // of the time, for showing an answer that comes

const isWide = matchMedia("(min-width: 60rem)");
const values = new Values(openStorage("localStorage"));
const secrets = new Values(openStorage("sessionStorage"));
const chats = new Conversations(values.storage, changedElsewhere);
const turns = new Map(); // by conversation
const problems = new Map(); // by conversation, of its last turn
let shown = newConversation();
let views = []; // of the messages that are shown

// -- asking --------------------------------------------------------------------------------------

function apiKey() { return secrets.get("key") ?? ""; }

function settings() { return Object.fromEntries(FIELDS.map((name) => [name, $(name).value.trim()])); }

function ask(conversation) {
  if (turns.has(conversation)) return;
  problems.delete(conversation);
  try {
    const body = requestBody(conversation, settings(), $("model").options.length > 1 ? $("model").value : "");
    turns.set(conversation, new Turn(conversation, body, apiKey(), changed, ended));
    $("progress").textContent = "The answer is coming";
  } catch (problem) {
    problems.set(conversation, problem);
  }
  keep(conversation);
  show();
}

function changed(turn) {
  if (turn.conversation === shown) renderSoon();
}

function ended(turn, problem) {
  const { conversation } = turn;
  turns.delete(conversation);
  const isRefusal = problem && (problem.kind !== "stopped" || conversation.messages.at(-1)?.role === "user");
  if (isRefusal) problems.set(conversation, problem);
  if (problem?.kind === "model") showModels();
  if (chats.byId.has(conversation.id)) keep(conversation);
  $("progress").textContent = problem ? "" : "The answer is complete";
  if (conversation !== shown) return renderList();
  show();
  if ([document.body, null, $("stop"), $("send")].includes(document.activeElement)) $("prompt").focus();
}

function keep(conversation) {
  conversation.changed = Date.now();
  chats.save(conversation);
  if (chats.isFull) notify("This browser's storage is full: the conversation is lost when the page is closed. Export it, or delete others.");
}

function send(text) {
  if (!text || turns.has(shown)) return;
  shown.messages.push({ role: "user", content: text });
  shown.title ||= titleOf(text);
  ask(shown);
  $("log").scrollTop = $("log").scrollHeight;
}

function titleOf(text) {
  const line = text.trim().split("\n", 1)[0].trim();
  return line.length > 60 ? line.slice(0, 59) + "…" : line;
}

/** Cuts the shown conversation off behind a message, and returns whether that was possible. */
function cutAfter(message, numKept) {
  const index = shown.messages.indexOf(message);
  if (index < 0 || turns.has(shown)) return false;
  shown.messages.length = index + numKept;
  return true;
}

const actions = {
  edit(message, text) {
    if (turns.has(shown)) return;
    if (message.role === "user" && !cutAfter(message, 0)) return;
    if (message.role === "user") return send(text);
    const index = shown.messages.indexOf(message);
    shown.messages[index] = { ...message, content: text };
    keep(shown);
    show();
  },
  again(message) { if (cutAfter(message, 0)) ask(shown); },
  answerCalls(message, results) {
    if (!cutAfter(message, 1)) return;
    message.tool_calls.forEach(({ id }, index) => shown.messages.push({ role: "tool", tool_call_id: id, content: results[index] }));
    ask(shown);
  },
  retry() {
    if (turns.has(shown)) return;
    while (shown.messages.at(-1)?.role === "assistant") shown.messages.pop();
    ask(shown);
  },
  useKey(key) {
    setKey(key);
    showModels();
    if (problems.get(shown)?.kind === "key") actions.retry();
  },
};

function setKey(key) {
  const sent = key.replace(/[^\x21-\x7e]/g, ""); // others no header can hold
  secrets.set("key", sent);
  $("key").value = sent;
}

// -- showing -------------------------------------------------------------------------------------

/** Makes the log match the shown conversation; views of messages that remain are kept. */
function show() {
  const { messages } = shown, isComing = turns.has(shown);
  atEnd(() => {
    let numKept = 0;
    while (numKept < views.length && views[numKept].message === messages[numKept]) numKept += 1;
    for (const view of views.splice(numKept)) view.node.remove();
    for (const message of messages.slice(numKept)) {
      const view = new MessageView(message, actions);
      views.push(view);
    }
    $("messages").append(...views.slice(numKept).map((view) => view.node));
    views.forEach((view, index) => view.update(isComing && index === views.length - 1, index === views.length - 1));
    showProblem();
  });
  $("welcome").hidden = messages.length > 0;
  $("send").hidden = isComing;
  $("stop").hidden = !isComing;
  document.title = shown.title ? shown.title + " · compiledllm" : "compiledllm";
  renderList();
}

function showProblem() {
  $("messages").querySelector(".error")?.remove();
  const isUnanswered = ["user", "tool"].includes(shown.messages.at(-1)?.role) && !turns.has(shown);
  const problem = problems.get(shown) ?? (isUnanswered ? new Problem("unanswered", "there is no answer yet") : null);
  if (problem) $("messages").append(problemNode(problem, actions));
}

/** Changes the log and stays at its end, unless the reader has scrolled up. */
function atEnd(change) {
  const log = $("log");
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  change();
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

let isRenderPlanned = false, earliestRender = 0;

/** Shows what came, once a frame at most, and less often where that takes long. */
function renderSoon() {
  if (isRenderPlanned) return;
  isRenderPlanned = true;
  setTimeout(() => requestAnimationFrame(render), Math.max(0, earliestRender - performance.now()));
}

function render() {
  isRenderPlanned = false;
  if (!turns.has(shown)) return;
  const began = performance.now();
  atEnd(() => views.at(-1).update(true));
  earliestRender = performance.now() + (performance.now() - began) / MAX_RENDER_SHARE;
}

function renderList() {
  if ($("chat-list").querySelector(".rename")) return;
  const listed = { open: openChat, menu: openMenu };
  $("chat-list").replaceChildren(...chats.list().map((chat) => chatRow(chat, chat === shown, turns.has(chat), listed)));
}

let isNoticeOfServer = false;

function notify(text, isOfServer = false, ...nodes) {
  isNoticeOfServer = isOfServer;
  $("notice").replaceChildren(text, ...nodes);
  $("notice").hidden = !text;
}

// -- conversations -------------------------------------------------------------------------------

function openChat(conversation) {
  shown = conversation;
  views = [];
  $("messages").replaceChildren();
  $("system").value = conversation.messages.length ? conversation.system : values.get("settings")?.system ?? "";
  conversation.system = $("system").value;
  show();
  $("log").scrollTop = $("log").scrollHeight;
  if (!isWide.matches) showChats(false);
  $("prompt").focus();
}

function newChat() { openChat(newConversation()); }

function changedElsewhere(id) {
  const conversation = [...turns.keys()].find((one) => one.id === id);
  if (conversation) chats.byId.set(id, conversation); // its end decides: a copy, if the other tab has changed it
  else {
    const found = chats.read(CHAT + id);
    if (shown.id === id && found) return openAgain(found);
    if (shown.id === id) newChat();
  }
  renderList();
}

function openAgain(conversation) {
  const text = $("prompt").value, focused = document.activeElement;
  openChat(conversation);
  $("prompt").value = text;
  focused?.focus?.();
}

function removeChat(conversation) {
  turns.get(conversation)?.stop();
  chats.remove(conversation.id);
  if (conversation === shown) newChat();
  else renderList();
  const undo = button("Undo", "", () => {
    conversation.version = "";
    chats.save(conversation);
    $("toast").hidden = true;
    openChat(conversation);
  });
  toast(`Deleted “${conversation.title || "New chat"}” `, undo);
}

let toastTimer = 0;

function toast(...parts) {
  clearTimeout(toastTimer);
  $("toast").replaceChildren(...parts);
  $("toast").hidden = false;
  toastTimer = setTimeout(() => { $("toast").hidden = true; }, 8000);
}

let menuOf = null; // the conversation of the open menu

function openMenu(conversation, from) {
  menuOf = conversation;
  const menu = $("menu"), place = from.getBoundingClientRect();
  menu.showPopover();
  menu.style.left = Math.min(place.left, innerWidth - menu.offsetWidth - 8) + "px";
  menu.style.top = Math.min(place.bottom + 2, innerHeight - menu.offsetHeight - 8) + "px";
  menu.querySelector("button").focus();
}

const menuActions = {
  rename(conversation) {
    const row = $("chat-list").querySelector(`[data-id="${conversation.id}"]`);
    if (row) renameIn(row, conversation.title, (title) => { conversation.title = title; chats.save(conversation); show(); });
  },
  markdown(conversation) { download(conversation.title || "chat", "text/markdown", asMarkdown(conversation)); },
  json(conversation) { download(conversation.title || "chat", "application/json", asJson([conversation])); },
  delete: removeChat,
};

async function importFiles(files) {
  let count = 0;
  for (const file of files) {
    try {
      for (const conversation of conversationsOf(await file.text())) { chats.save(conversation); count += 1; }
    } catch {
      toast(`${file.name} holds no conversations that were exported here`);
      return renderList();
    }
  }
  toast(chats.isFull ? "This browser's storage is full: not all is kept" : `Imported ${count} conversation${count === 1 ? "" : "s"}`);
  renderList();
}

function showChats(isShown) {
  $("chats").hidden = !isShown;
  $("backdrop").hidden = !isShown || isWide.matches;
  $("toggle").ariaExpanded = String(isShown);
}

// -- settings and models -------------------------------------------------------------------------

function loadSettings() {
  const kept = values.get("settings") ?? {};
  for (const name of FIELDS) if (typeof kept[name] === "string") $(name).value = kept[name];
  shown.system = $("system").value;
  $("key").value = apiKey();
}

function saveSettings() {
  setKey($("key").value);
  values.set("settings", settings());
  if (shown.system === $("system").value.trim()) return;
  shown.system = $("system").value.trim();
  if (shown.messages.length) chats.save(shown);
}

async function showModels() {
  let names = [];
  try {
    names = await modelNames(apiKey());
    if (isNoticeOfServer) notify("");
  } catch (problem) {
    const isKey = problem.kind === "key";
    notify(problem.message ?? "the server cannot be reached", true, ...(isKey ? [" ", keyForm(actions.useKey)] : []));
    if (!isKey) setTimeout(showModels, POLL_MS);
  }
  const chosen = $("model").value || values.get("model");
  $("model").replaceChildren(...names.map((name) => element("option", "", name)));
  if (names.includes(chosen)) $("model").value = chosen;
  $("model").disabled = names.length < 2;
}

// -- keys and buttons ----------------------------------------------------------------------------

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (turns.has(shown)) return;
  const text = $("prompt").value.trim();
  $("prompt").value = "";
  fit($("prompt"));
  send(text);
});
onEnter($("prompt"), () => $("form").requestSubmit());
$("prompt").addEventListener("input", () => fit($("prompt")));
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "ArrowUp" && !$("prompt").value) views.findLast((view) => view.message.role === "user")?.edit();
});
$("stop").addEventListener("click", () => turns.get(shown)?.stop());
$("clear").addEventListener("click", newChat);
$("toggle").addEventListener("click", () => {
  showChats($("chats").hidden);
  if (isWide.matches) values.set("has-list", !$("chats").hidden);
});
$("backdrop").addEventListener("click", () => showChats(false));
$("export-all").addEventListener("click", () => download("compiledllm chats", "application/json", asJson(chats.list())));
$("import").addEventListener("click", () => $("import-file").click());
$("import-file").addEventListener("change", async () => {
  await importFiles([...$("import-file").files]);
  $("import-file").value = "";
});
$("menu").addEventListener("click", (event) => {
  const { action } = event.target.dataset;
  if (!action) return;
  $("menu").hidePopover();
  menuActions[action](menuOf);
});
$("model").addEventListener("change", () => values.set("model", $("model").value));
for (const kind of ["input", "change"]) $("settings").addEventListener(kind, saveSettings);
$("reset").addEventListener("click", () => setTimeout(saveSettings));
$("settings").querySelector("form").addEventListener("submit", (event) => { event.preventDefault(); $("settings").open = false; });
$("messages").addEventListener("click", (event) => {
  if (!event.target.classList.contains("copy-code")) return;
  copyFrom(event.target, event.target.closest(".code").querySelector("code").textContent);
});
$("log").addEventListener("scroll", () => {
  const { scrollHeight, scrollTop, clientHeight } = $("log");
  $("to-end").hidden = scrollHeight - scrollTop - clientHeight < 200;
});
$("to-end").addEventListener("click", () => { $("log").scrollTop = $("log").scrollHeight; });
document.addEventListener("click", (event) => {
  if ($("settings").open && !$("settings").contains(event.target)) $("settings").open = false;
});
document.addEventListener("keydown", (event) => {
  if (isComposing(event)) return;
  if (event.ctrlKey && event.shiftKey && event.key.toLowerCase() === "o") { event.preventDefault(); newChat(); }
  if (event.key !== "Escape" || $("menu").matches(":popover-open")) return;
  if ($("settings").open) { $("settings").open = false; $("settings").querySelector("summary").focus(); }
  else if (!$("chats").hidden && !isWide.matches) showChats(false);
  else turns.get(shown)?.stop();
});
addEventListener("pagehide", () => { for (const conversation of turns.keys()) chats.save(conversation); });
isWide.addEventListener("change", () => showChats(isWide.matches && values.get("has-list") !== false));

loadSettings();
showChats(isWide.matches && values.get("has-list") !== false);
if (!values.storage) notify("This browser gives the page no storage: conversations are lost when it is closed.");
show();
showModels();
