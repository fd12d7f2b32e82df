// Functions that test_page.py calls in the chat page.
"use strict";

/** The HTML of a text that came character by character, and of the same text at once. */
function streamedAndWhole(text) {
  const streamed = document.createElement("div"), whole = document.createElement("div");
  const live = new LiveMarkdown(streamed);
  for (let end = 1; end <= text.length; end += 1) live.show(text.slice(0, end));
  live.show(text, true);
  new LiveMarkdown(whole).show(text, true);
  return [streamed.innerHTML, whole.innerHTML];
}

/** How often each character is read while an answer of some 10,000 tokens is shown token by token. */
function timesRead() {
  const text = "Some *words* of a paragraph, and more.\n\n- item\n- item\n\n".repeat(700);
  const live = new LiveMarkdown(document.createElement("div")), read = tokensOf;
  let numRead = 0;
  tokensOf = (part) => { numRead += part.length; return read(part); };
  for (let end = 4; end < text.length; end += 4) live.show(text.slice(0, end));
  tokensOf = read;
  return numRead / text.length;
}

/** Texts for which marked or highlight.js need many seconds, or overflow the stack. */
const HOSTILE_TEXTS = [
  "_a*".repeat(15000), "a" + " ".repeat(50000) + "b", "> ".repeat(5000) + "a", ">".repeat(5000), "1. ".repeat(2000),
  "* * ".repeat(20000) + "a", "[".repeat(30000), "|a|b|\n|-|-|\n" + "|_a*".repeat(8000), "```\n".repeat(5000),
  "\\(".repeat(20000), "```csharp\n" + "a b ".repeat(10000), "```java\n" + "a".repeat(20000), "<a ".repeat(10000),
  "$$".repeat(20000), "$$\n".repeat(20000), "\\[\n".repeat(20000), "$$\n\n".repeat(10000), "\\[\n\n".repeat(10000),
  "\\( \\[ $$".repeat(900), "![](".repeat(10000), "&#1".repeat(20000),
];

/** The beginnings of those texts that are not shown at once: some would take half a minute. */
function hostileTextsNotShown() {
  const isShown = (text) => {
    const node = document.createElement("div"), began = performance.now();
    new LiveMarkdown(node).show(text, true);
    return node.textContent !== "" && performance.now() - began < 10000;
  };
  return HOSTILE_TEXTS.filter((text) => !isShown(text.slice(0, 999)) || !isShown(text)).map((text) => text.slice(0, 20));
}

/** Tag, names of attributes, link and classes of everything in the roots. */
function elementsIn(root) {
  return [...document.querySelectorAll(root + " *")].map((node) =>
    [node.localName, node.getAttributeNames(), node.getAttribute("href"), node.className]);
}

/** Counts, as `numUpdates`, how often a message is shown. */
function countUpdates() {
  const { update } = MessageView.prototype;
  window.numUpdates = 0;
  MessageView.prototype.update = function (...given) { window.numUpdates += 1; update.apply(this, given); };
}

Object.assign(window, { HOSTILE_TEXTS, streamedAndWhole, timesRead, hostileTextsNotShown, elementsIn, countUpdates });
