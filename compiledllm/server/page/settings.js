"use strict";
// The settings' fields, the key, the names of models, and what is told of the server and the storage.

const FIELDS = ["system", "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "reasoning_effort", "further"];
const POLL_MS = 3000;

function apiKey() { return secrets.get("key") ?? ""; }

function settings() { return Object.fromEntries(FIELDS.map((name) => [name, $(name).value.trim()])); }

function setKey(key) {
  const sent = key.replace(/[^\x21-\x7e]/g, ""); // others no header can hold
  secrets.set("key", sent);
  $("key").value = sent;
}

function loadSettings() {
  const kept = values.get("settings") ?? {};
  for (const name of FIELDS) if (typeof kept[name] === "string") $(name).value = kept[name];
  if (shown.messages.length) $("system").value = shown.system;
  else shown.system = $("system").value;
  $("key").value = apiKey();
}

/** The system prompt is the conversation's; the one that was written last is also that of new ones. */
function saveSettings({ target }) {
  setKey($("key").value);
  const isSystem = target === $("system"), now = settings();
  values.set("settings", isSystem ? now : { ...now, system: values.get("settings")?.system ?? "" });
  if (!isSystem) return;
  shown.system = now.system;
  if (shown.messages.length) chats.save(shown);
}

let modelsTimer = 0;

async function showModels() {
  let names = [];
  clearTimeout(modelsTimer);
  try {
    names = await modelNames(apiKey());
    notify("server", "");
  } catch (problem) {
    const isKey = problem.kind === "key";
    notify("server", problem.message, ...(isKey ? [" ", keyForm(actions.useKey)] : []));
    if (!isKey) modelsTimer = setTimeout(showModels, POLL_MS);
  }
  const picker = $("models"), chosen = picker.value || values.get("model");
  picker.replaceChildren(...names.map((name) => element("option", "", name)));
  if (names.includes(chosen)) picker.value = chosen;
  picker.hidden = names.length < 2;
  $("model").textContent = picker.value;
}

const notices = { server: [], storage: [] };

/** Sets what is told of the server or of the storage; no text: nothing. */
function notify(about, text, ...nodes) {
  notices[about] = text ? [text, ...nodes] : [];
  const told = notices.server.length ? notices.server : notices.storage;
  $("notice").replaceChildren(...told);
  $("notice").hidden = !told.length;
}

function notifyOfStorage() {
  const loss = "conversations are lost when the page is closed";
  if (!values.storage) return notify("storage", `this browser gives the page no storage: ${loss}`);
  notify("storage", chats.isFull && `this browser's storage is full: new ${loss}. Export or delete some.`);
}

$("models").addEventListener("change", () => {
  $("model").textContent = $("models").value;
  values.set("model", $("models").value);
});
for (const kind of ["input", "change"]) $("settings").addEventListener(kind, saveSettings);
$("settings").addEventListener("reset", () => setTimeout(() => saveSettings({ target: $("system") })));
$("key").addEventListener("change", showModels);
$("settings").querySelector("form").addEventListener("submit", (event) => { event.preventDefault(); $("settings").open = false; });
document.addEventListener("click", (event) => {
  if ($("settings").open && !$("settings").contains(event.target)) $("settings").open = false;
});
addEventListener("storage", (event) => { if (event.key === PREFIX + "settings") loadSettings(); });
