"use strict";
// Shows Markdown that a model wrote. The DOM is built node by node from marked's tokens, and nothing becomes DOM by being
// parsed as HTML: a model's own tags are text, but for a few without attributes. Links lead to http, https and mailto only.

const LEXER_OPTIONS = { ...marked.getDefaults(), gfm: true, breaks: true };
const INLINE_TAGS = new Set(["b", "i", "u", "s", "em", "strong", "sub", "sup", "kbd", "mark", "code"]);
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", mdash: "—", ndash: "–", hellip: "…" };
const MAX_INLINE_LENGTH = 10000; // characters of a paragraph; marked takes quadratic time
const MAX_EMPHASIS_MARKS = 500; // of a paragraph, for the same reason
const DEEPLY_NESTED = /^[ \t]*(?:>[ \t]?|(?:[-*+]|\d{1,9}[.)])[ \t]+){100}/m; // marked recurses
const MAX_HIGHLIGHTED_LENGTH = 20000;
const MAX_HIGHLIGHTED_WORD = 1000;
const MAX_HIGHLIGHT_MS = 200; // a language that has taken longer is not highlighted again

marked.use({
  extensions: [
    mathExtension("mathBlock", "block", /^(?:\\\[[^]{1,2000}?\\\]|\$\$[^]{1,2000}?\$\$)(?:\n|$)/),
    mathExtension("math", "inline", /^(?:\\\([^]{1,1000}?\\\)|\\\[[^]{1,1000}?\\\]|\$\$[^]{1,1000}?\$\$)/, /\\[([]|\$\$/),
  ],
});
LEXER_OPTIONS.extensions = marked.defaults.extensions;

/** TeX, which is shown as it is: Markdown would take its backslashes and underscores away. */
function mathExtension(name, level, pattern, beginning) {
  return {
    name, level,
    start: beginning && ((text) => { const index = text.search(beginning); return index < 0 ? undefined : index; }),
    tokenizer(text) { const raw = pattern.exec(text)?.[0]; return raw && { type: name, raw, text: raw.trim() }; },
  };
}

// -- tokens --------------------------------------------------------------------------------------

/** The block tokens of a text; a text on which marked would fail or freeze is a single token. */
function tokensOf(text) {
  if (DEEPLY_NESTED.test(text)) return [plainToken(text)];
  try {
    const lexer = new marked.Lexer(LEXER_OPTIONS);
    const tokens = lexer.blockTokens(text, lexer.tokens);
    for (const { src, tokens: found } of lexer.inlineQueue) {
      if (isTooLong(src)) found.push(plainToken(src));
      else lexer.inlineTokens(src, found);
    }
    return tokens;
  } catch {
    return [plainToken(text)];
  }
}

function plainToken(text) { return { type: "plain", raw: text, text }; }

function isTooLong(text) {
  return text.length > MAX_INLINE_LENGTH || (text.match(/[*_~]/g)?.length ?? 0) > MAX_EMPHASIS_MARKS;
}

// -- DOM of tokens -------------------------------------------------------------------------------

function element(tag, className = "", ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

const NODES = {
  space: () => "",
  def: () => "",
  hr: () => element("hr"),
  br: () => element("br"),
  heading: (token) => withChildren(element("h" + token.depth), token.tokens),
  paragraph: (token) => withChildren(element("p"), token.tokens),
  blockquote: (token) => withChildren(element("blockquote"), token.tokens),
  strong: (token) => withChildren(element("strong"), token.tokens),
  em: (token) => withChildren(element("em"), token.tokens),
  del: (token) => withChildren(element("del"), token.tokens),
  text: (token) => (token.tokens ? withChildren(document.createDocumentFragment(), token.tokens) : decoded(token.text)),
  escape: (token) => token.text,
  codespan: (token) => element("code", "", token.text),
  checkbox: (token) => (token.checked ? "☑ " : "☐ "),
  html: (token) => (/^<br\s*\/?>\s*$/i.test(token.text) ? element("br") : token.block ? element("p", "plain", token.text) : token.text),
  plain: (token) => element("span", "plain", token.text),
  math: (token) => element("code", "math", token.text),
  mathBlock: (token) => element("p", "", element("code", "math", token.text)),
  link: (token) => link(token.href, withChildren(document.createDocumentFragment(), token.tokens)),
  image: (token) => link(token.href, "🖼 " + (token.text || token.href)), // nothing is fetched from other hosts
  code: (token) => codeBlock(token.text, (token.lang ?? "").trim().split(/\s/)[0], token.isOpen),
  list: listNode,
  table: tableNode,
};

function nodeOf(token) {
  return Object.hasOwn(NODES, token.type) ? NODES[token.type](token) : token.raw;
}

/** Adds the tokens' nodes to a parent; pairs of allowed tags become elements. */
function withChildren(parent, tokens) {
  const open = [parent];
  for (const token of tokens) {
    const [, slash, tag] = (token.type === "html" && /^<(\/?)([a-z]+)>$/i.exec(token.raw)) || [];
    const name = tag?.toLowerCase();
    if (INLINE_TAGS.has(name) && !slash && open.length < 10) {
      const child = element(name);
      open.at(-1).append(child);
      open.push(child);
    } else if (INLINE_TAGS.has(name) && open.length > 1 && open.at(-1).localName === name) open.pop();
    else open.at(-1).append(nodeOf(token));
  }
  return parent;
}

function decoded(text) {
  return text.replace(/&(?:#(\d{1,7})|#x([\da-f]{1,6})|(\w{2,8}));/gi, (whole, decimal, hex, name) => {
    if (name) return Object.hasOwn(ENTITIES, name) ? ENTITIES[name] : whole;
    const code = decimal ? parseInt(decimal, 10) : parseInt(hex, 16);
    return code > 0 && code <= 0x10ffff ? String.fromCodePoint(code) : whole;
  });
}

function link(href, content) {
  let url = null;
  try { url = new URL(decoded(href)); } catch { /* relative: it would lead into this server */ }
  if (!url || !["http:", "https:", "mailto:"].includes(url.protocol)) return element("span", "", content);
  const node = element("a", "", content);
  Object.assign(node, { href: url.href, title: url.href, target: "_blank", rel: "noopener noreferrer nofollow" });
  return node;
}

function listNode(token) {
  const list = element(token.ordered ? "ol" : "ul");
  if (token.ordered && token.start > 1) list.start = token.start;
  for (const item of token.items) list.append(withChildren(element("li", item.task ? "task" : ""), item.tokens));
  return list;
}

function tableNode(token) {
  const row = (tag, cells) => element("tr", "", ...cells.map((cell) => {
    const node = withChildren(element(tag), cell.tokens);
    if (cell.align) node.style.textAlign = cell.align;
    return node;
  }));
  const body = element("tbody", "", ...token.rows.map((cells) => row("td", cells)));
  return element("div", "table", element("table", "", element("thead", "", row("th", token.header)), body));
}

// -- code ----------------------------------------------------------------------------------------

/** isOpen: it still grows; then only what is short is highlighted, as each time is all of it. */
function codeBlock(text, language, isOpen = false, label = language) {
  const code = element("code", "", ...highlighted(text, language, isOpen));
  const pre = element("pre", "", code);
  pre.tabIndex = 0; // so that the arrow keys scroll it
  const copy = element("button", "copy-code", "Copy");
  copy.type = "button";
  return element("div", "code", element("div", "code-head", element("span", "", label.slice(0, 60)), copy), pre);
}

const slowLanguages = new Set();

function highlighted(text, language, isOpen) {
  const grammar = hljs.getLanguage(language);
  const limit = isOpen ? MAX_HIGHLIGHTED_LENGTH / 5 : MAX_HIGHLIGHTED_LENGTH;
  const hasLongWord = new RegExp(`\\S{${MAX_HIGHLIGHTED_WORD}}`).test(text);
  if (!grammar || text.length > limit || hasLongWord || slowLanguages.has(grammar.name)) return [text];
  const began = performance.now();
  const html = hljs.highlight(text, { language, ignoreIllegals: true }).value;
  if (performance.now() - began > MAX_HIGHLIGHT_MS) slowLanguages.add(grammar.name);
  return spansOf(html);
}

/** The nodes of highlight.js' output, which has spans with a class and five entities only. */
function spansOf(html) {
  const root = document.createDocumentFragment(), open = [root];
  for (const piece of html.split(/(<span class="[^"<>]*">|<\/span>)/)) {
    const className = /^<span class="(.*)">$/.exec(piece)?.[1];
    if (className !== undefined) {
      const span = element("span", className);
      open.at(-1).append(span);
      open.push(span);
    } else if (piece === "</span>" && open.length > 1) open.pop();
    else if (piece) open.at(-1).append(piece.replace(/&(amp|lt|gt|quot|#x27);/g, (_, name) => ENTITIES[name] ?? "'"));
  }
  return root.childNodes;
}

// -- a text that grows ---------------------------------------------------------------------------

/**
 * Shows a text that grows. All blocks but the last two are final while it grows, and the whole text is read once more when
 * it is whole, as rarely what follows changes them. Only blocks that have changed are made anew.
 */
class LiveMarkdown {
  constructor(node) {
    this.node = node;
    this.clear();
  }

  clear() {
    this.node.replaceChildren();
    this.blocks = []; // what each was made of, and its nodes
    this.numFinal = this.finalLength = 0; // blocks and their characters
    this.shown = null;
  }

  show(text, isWhole = false) {
    if (this.shown === text && this.isWhole === isWhole) return;
    const clean = text.replace(/\r\n?/g, "\n");
    if (isWhole && /\[[^\]\n]+\]:/.test(clean)) this.clear(); // definitions of links change earlier blocks
    if (isWhole) this.numFinal = this.finalLength = 0;
    const tokens = tokensOf(clean.slice(this.finalLength));
    if (!isWhole && tokens.at(-1)?.type === "code") tokens.at(-1).isOpen = true;
    this.replaceBlocks(tokens);
    const shown = tokens.flatMap(({ type }, index) => (type === "space" ? [] : [index]));
    const numFinal = isWhole ? 0 : shown.at(-2) ?? 0; // the last may still join the one before: "2" becomes "2."
    this.numFinal += numFinal;
    for (const { raw } of tokens.slice(0, numFinal)) this.finalLength += raw.length;
    Object.assign(this, { shown: text, isWhole });
  }

  /** Makes the blocks behind the final ones match the tokens. */
  replaceBlocks(tokens) {
    const keys = tokens.map(({ raw, isOpen = false }) => isOpen + raw);
    let numKept = 0;
    while (numKept < tokens.length && this.blocks[this.numFinal + numKept]?.key === keys[numKept]) numKept += 1;
    for (const { nodes } of this.blocks.splice(this.numFinal + numKept)) for (const node of nodes) node.remove();
    for (const [index, token] of tokens.entries()) {
      if (index < numKept) continue;
      const piece = document.createDocumentFragment();
      piece.append(nodeOf(token));
      this.blocks.push({ key: keys[index], nodes: [...piece.childNodes] });
      this.node.append(piece);
    }
  }
}
