"use strict";
// The conversations beside the shown one: listed, opened, renamed, deleted, exported, imported, and changed by other tabs.

const isWide = matchMedia("(min-width: 60rem)");
const chats = new Conversations(values.storage, changedElsewhere);

function renderList() {
  if ($("chat-list").querySelector(".rename")) return;
  const focused = document.activeElement.closest("#chat-list li")?.dataset.id;
  const listed = { open: openChat, menu: openMenu };
  $("chat-list").replaceChildren(...chats.list().map((chat) => chatRow(chat, chat === shown, turns.has(chat), listed)));
  if (focused) rowOf(focused)?.querySelector(".open-chat").focus();
}

function rowOf(id) { return $("chat-list").querySelector(`[data-id="${id}"]`); }

function openChat(conversation) {
  shown = conversation;
  views = [];
  $("messages").replaceChildren();
  $("system").value = conversation.messages.length ? conversation.system : values.get("settings")?.system ?? "";
  conversation.system = $("system").value;
  show();
  $("log").scrollTop = $("log").scrollHeight;
  if (!isWide.matches) showChats(false);
  focusPrompt();
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
    const row = rowOf(conversation.id);
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
isWide.addEventListener("change", () => showChats(isWide.matches && values.get("has-list") !== false));
