"use strict";
// Messages, problems and the list of conversations as DOM. What is to be done is asked of `actions`, which main.js gives.

const $ = (id) => document.getElementById(id);

function button(label, className, pressed) {
  const node = element("button", className, label);
  node.type = "button";
  node.addEventListener("click", pressed);
  return node;
}

function iconButton(icon, label, pressed) {
  const node = button("", "icon", pressed);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", "#icon-" + icon);
  svg.append(use);
  node.append(svg);
  node.ariaLabel = node.title = label;
  return node;
}

/** Grows a text field with its text; CSS bounds its height. */
function fit(field) {
  field.style.height = "auto";
  field.style.height = field.scrollHeight + 2 + "px";
}

function isComposing(event) { return event.isComposing || event.keyCode === 229; } // Enter there ends the composition

/** Calls sent() when Enter is pressed without Shift. */
function onEnter(field, sent) {
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || isComposing(event)) return;
    event.preventDefault();
    sent();
  });
}

async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text).then(() => true, () => false);
  const field = element("textarea", "unseen"); // over plain HTTP there is no clipboard but this
  field.value = text;
  document.body.append(field);
  field.select();
  const isDone = document.execCommand("copy");
  field.remove();
  return isDone;
}

/** Shows on a button for a moment that its text was copied. */
async function copyFrom(node, text) {
  const use = node.querySelector("use"), before = use ? use.getAttribute("href") : node.textContent;
  const show = (icon, label) => (use ? use.setAttribute("href", icon) : (node.textContent = label));
  node.disabled = true;
  const isDone = await copyText(text);
  show(isDone ? "#icon-done" : before, isDone ? "Copied" : "Not copied");
  setTimeout(() => { show(before, before); node.disabled = false; }, 1500);
}

// -- a message -----------------------------------------------------------------------------------

/** actions: edit(message, text), again(message), answerCalls(message, results). */
class MessageView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.body = element("div", "message " + message.role);
    this.body.dir = "auto";
    this.under = element("div", "under");
    this.node = element("article", "turn by-" + message.role, this.body, this.under);
    this.node.ariaLabel = SPEAKERS[message.role];
    if (message.role === "assistant") this.addAnswerParts();
    else if (message.role === "tool") this.body.append(element("span", "call-name", "Result"), element("pre", "", message.content));
    else this.body.textContent = message.content;
    this.addTools();
  }

  addAnswerParts() {
    this.live = new LiveMarkdown(this.body);
    this.calls = element("div", "calls");
    this.facts = element("span", "facts");
    this.usage = element("span", "usage");
    this.body.after(this.calls);
    this.under.append(this.facts, this.usage);
  }

  addTools() {
    const { message, actions } = this;
    const tools = [iconButton("copy", "Copy", (event) => copyFrom(event.currentTarget, message.content))];
    if (message.role !== "tool") tools.push(iconButton("edit", "Edit", () => this.edit()));
    if (message.role === "assistant") tools.push(iconButton("again", "Answer again", () => actions.again(message)));
    this.tools = element("span", "tools", ...tools);
    this.under.append(this.tools);
  }

  /** Shows what an answer has now. isComing: more follows. isLast: calls can be answered. */
  update(isComing, isLast = false) {
    if (this.message.role !== "assistant") return;
    const { message } = this;
    this.isComing = isComing;
    this.live.show(message.content, !isComing);
    const isWaiting = isComing && !message.content && !message.tool_calls;
    this.body.classList.toggle("waiting", isWaiting && !message.reasoning);
    this.body.hidden = !message.content && !isWaiting;
    this.updateReasoning();
    this.updateCalls(isLast && !isComing);
    this.facts.textContent = answerFacts(message);
    this.usage.textContent = promptFacts(message);
    this.tools.hidden = isComing;
  }

  updateReasoning() {
    const { reasoning } = this.message;
    if (!reasoning) return;
    this.reasoning ??= this.newReasoning();
    this.reasoningLabel.textContent = thoughtLabel(this.message, this.isComing);
    if (this.reasoning.open) this.liveReasoning.show(reasoning);
  }

  newReasoning() {
    const text = element("div", "reasoning-text");
    this.liveReasoning = new LiveMarkdown(text);
    this.reasoningLabel = element("summary");
    const node = element("details", "reasoning", this.reasoningLabel, text);
    node.addEventListener("toggle", () => this.updateReasoning());
    this.node.prepend(node);
    return node;
  }

  updateCalls(canAnswer) {
    const calls = this.message.tool_calls ?? [];
    const shown = JSON.stringify([calls, canAnswer]);
    if (shown === this.shownCalls) return;
    this.shownCalls = shown;
    this.calls.replaceChildren(...calls.map(({ function: called }) => codeBlock(indented(called.arguments), "json", this.isComing, "⚙ " + called.name)));
    if (canAnswer && calls.length) this.calls.append(this.resultForm(calls));
  }

  resultForm(calls) {
    const fields = calls.map((call) => {
      const field = element("textarea");
      field.rows = 1;
      field.placeholder = field.ariaLabel = `What ${call.function.name || "the tool"} returns`;
      field.addEventListener("input", () => fit(field));
      return field;
    });
    const form = element("form", "results", ...fields, element("button", "", calls.length > 1 ? "Send results" : "Send result"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.actions.answerCalls(this.message, fields.map((field) => field.value));
    });
    return form;
  }

  edit() {
    if (this.editor || this.isComing) return;
    const { message, actions } = this, isUser = message.role === "user";
    const field = element("textarea");
    field.ariaLabel = "Text of the message";
    field.value = message.content;
    const leave = () => { this.editor.remove(); this.editor = null; this.body.hidden = !message.content; this.under.hidden = false; };
    const save = () => { const text = field.value.trim(); leave(); if (text && text !== message.content) actions.edit(message, text); };
    const buttons = element("div", "buttons", button("Cancel", "", leave), button(isUser ? "Send" : "Save", "primary", save));
    this.editor = element("div", "editor", field, buttons);
    field.addEventListener("input", () => fit(field));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !isComposing(event)) { event.stopPropagation(); leave(); }
    });
    if (isUser) onEnter(field, save);
    this.body.hidden = this.under.hidden = true;
    this.body.after(this.editor);
    fit(field);
    field.focus();
  }
}

function indented(json) {
  try { return JSON.stringify(JSON.parse(json), null, 2); } catch { return json; }
}

// -- problems ------------------------------------------------------------------------------------

/** actions: retry(), useKey(key). */
function problemNode(problem, actions) {
  const node = element("div", "message error", problem.message + " ");
  node.setAttribute("role", "alert");
  if (problem.kind === "key") node.append(keyForm(actions.useKey));
  else node.append(button("Try again", "retry", actions.retry));
  return node;
}

function keyForm(used) {
  const field = element("input");
  Object.assign(field, { type: "password", autocomplete: "off", required: true, placeholder: "API key", ariaLabel: "API key" });
  const form = element("form", "key-form", field, element("button", "primary", "Use key"));
  form.addEventListener("submit", (event) => { event.preventDefault(); used(field.value); });
  return form;
}

// -- the list of conversations -------------------------------------------------------------------

/** actions: open(conversation), menu(conversation, button). */
function chatRow(conversation, isShown, isComing, actions) {
  const title = conversation.title || "New chat";
  const open = button(title, "open-chat", () => actions.open(conversation));
  open.title = title;
  open.dir = "auto";
  if (isShown) open.setAttribute("aria-current", "page");
  const more = iconButton("more", `Actions for ${title}`, (event) => actions.menu(conversation, event.currentTarget));
  const row = element("li", isComing ? "coming" : "", open, more);
  row.dataset.id = conversation.id;
  return row;
}

/** Makes a row's title a field. renamed(title): called once, if it has changed. */
function renameIn(row, title, renamed) {
  const field = element("input", "rename"), open = row.querySelector(".open-chat");
  Object.assign(field, { value: title, maxLength: MAX_TITLE_LENGTH, ariaLabel: "Title" });
  let isDone = false;
  const end = (isKept) => {
    if (isDone) return;
    isDone = true;
    field.replaceWith(open);
    const text = field.value.trim();
    open.focus();
    if (isKept && text && text !== title) renamed(text);
  };
  field.addEventListener("keydown", (event) => {
    if (isComposing(event) || !["Enter", "Escape"].includes(event.key)) return;
    event.preventDefault(); // or Enter presses the button that gets the focus
    event.stopPropagation();
    end(event.key === "Enter");
  });
  field.addEventListener("blur", () => end(true));
  open.replaceWith(field);
  field.select();
}

function download(name, type, text) {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) + (type.includes("json") ? ".json" : ".md");
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
