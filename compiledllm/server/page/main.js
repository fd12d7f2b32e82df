"use strict";
// The page: which conversation is shown, what is asked, and what the reader's keys and buttons do.

const MAX_RENDER_SHARE = 0.2; // of the time, for showing an answer that comes

const isTouch = matchMedia("(hover: none) and (pointer: coarse)"); // its keyboard covers the page and has no Shift+Enter
const turns = new Map(); // by conversation
const problems = new Map(); // by conversation, of its last turn
let shown = newConversation();
let views = []; // of the messages that are shown

// -- asking --------------------------------------------------------------------------------------

function ask(conversation) {
  if (turns.has(conversation)) return;
  problems.delete(conversation);
  try {
    const body = requestBody(conversation, settings(), $("models").hidden ? "" : $("models").value);
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
  if ([document.body, null, $("stop"), $("send")].includes(document.activeElement)) focusPrompt();
}

function keep(conversation) {
  conversation.changed = Date.now();
  chats.save(conversation);
  notifyOfStorage();
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

// -- showing -------------------------------------------------------------------------------------

/** Makes the log match the shown conversation; views of messages that remain are kept. */
function show() {
  const { messages } = shown, isComing = turns.has(shown);
  atEnd(() => {
    let numKept = 0;
    while (numKept < views.length && views[numKept].message === messages[numKept]) numKept += 1;
    for (const view of views.splice(numKept)) view.node.remove();
    for (const message of messages.slice(numKept)) views.push(new MessageView(message, actions));
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

function focusPrompt() { if (!isTouch.matches) $("prompt").focus(); }

// -- keys and buttons ----------------------------------------------------------------------------

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (turns.has(shown)) return;
  const text = $("prompt").value.trim();
  $("prompt").value = "";
  fit($("prompt"));
  send(text);
});
if (!isTouch.matches) onEnter($("prompt"), () => $("form").requestSubmit());
$("prompt").addEventListener("input", () => fit($("prompt")));
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "ArrowUp" && !$("prompt").value) views.findLast((view) => view.message.role === "user")?.edit();
});
$("stop").addEventListener("click", () => turns.get(shown)?.stop());
$("clear").addEventListener("click", newChat);
$("messages").addEventListener("click", (event) => {
  if (!event.target.classList.contains("copy-code")) return;
  copyFrom(event.target, event.target.closest(".code").querySelector("code").textContent);
});
$("log").addEventListener("scroll", () => {
  const { scrollHeight, scrollTop, clientHeight } = $("log");
  $("to-end").hidden = scrollHeight - scrollTop - clientHeight < 200;
});
$("to-end").addEventListener("click", () => { $("log").scrollTop = $("log").scrollHeight; });
document.addEventListener("keydown", (event) => {
  if (isComposing(event)) return;
  if (event.ctrlKey && event.shiftKey && event.key.toLowerCase() === "o") { event.preventDefault(); newChat(); }
  if (event.key !== "Escape" || $("menu").matches(":popover-open")) return;
  if ($("settings").open) { $("settings").open = false; $("settings").querySelector("summary").focus(); }
  else if (!$("chats").hidden && !isWide.matches) showChats(false);
  else turns.get(shown)?.stop();
});
addEventListener("pagehide", () => { for (const conversation of turns.keys()) chats.save(conversation); });

loadSettings();
showChats(isWide.matches && values.get("has-list") !== false);
notifyOfStorage();
show();
showModels();
