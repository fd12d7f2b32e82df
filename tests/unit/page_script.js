// Runs the chat page's script against a small stand-in for a browser: node page_script.js page.html.
// Prints, as JSON, what each scenario of test_page_script.py saw.
"use strict";
const fs = require("node:fs"), vm = require("node:vm");
const source = fs.readFileSync(process.argv[2], "utf8").match(/<script>([^]*)<\/script>/)[1];

class Node {
  constructor() { Object.assign(this, { children: [], listeners: {}, className: "", value: "", hidden: false, style: {} }); this.text = ""; }
  get textContent() { return this.text + this.children.map((child) => child.textContent ?? child).join(""); }
  set textContent(text) { this.text = text; this.children = []; }
  get classList() { return { remove: (name) => { this.className = this.className.split(" ").filter((one) => one !== name).join(" "); } }; }
  append(...nodes) { for (const node of nodes) { this.children.push(node); if (node.children) node.parent = this; } }
  remove() { if (this.parent) this.parent.children = this.parent.children.filter((child) => child !== this); }
  replaceChildren() { this.children = []; }
  querySelectorAll(selector) { return this.children.flatMap((c) => (c.children ? [...c.querySelectorAll(selector), ...(("." + c.className) === selector ? [c] : [])] : [])); }
  addEventListener(kind, heard) { this.listeners[kind] = heard; }
  fire(kind, more = {}) { const event = { preventDefault() { event.isPrevented = true; }, ...more }; this.listeners[kind]?.(event); return event; }
  requestSubmit() { this.fire("submit"); }
  focus() {}
}

const settled = () => new Promise((resolve) => setTimeout(resolve, 20));

function browser() {
  const nodes = {}, answers = [], asked = [];
  const byId = (id) => (nodes[id] ??= new Node());
  byId("max_tokens").value = "512"; byId("temperature").value = "0.7";
  const fetch = async (path, options) => {
    if (path === "v1/models") return { ok: true, json: async () => ({ data: [{ id: "m" }] }) };
    asked.push(JSON.parse(options.body));
    const answer = {};
    answer.body = new ReadableStream({ start(controller) { answer.controller = controller; } });
    options.signal.addEventListener("abort", () => { if (answer.isDeaf) return; answer.refuse(options.signal.reason); answer.controller.error(options.signal.reason); });
    answers.push(answer);
    return new Promise((resolve, reject) => { answer.begin = (more = { ok: true }) => resolve({ body: answer.body, ...more }); answer.refuse = reject; });
  };
  const globals = { document: { getElementById: byId, createElement: () => new Node(), body: new Node() }, fetch, performance, AbortController, TextDecoderStream, setTimeout, console };
  vm.runInNewContext(source, { ...globals, TypeError, Error });
  const encoder = new TextEncoder();
  const page = {
    byId, answers, asked,
    send(text) { byId("prompt").value = text; byId("form").requestSubmit(); },
    say(i, text) { answers[i].controller.enqueue(encoder.encode(text)); },
    delta(i, content, more = {}) { page.say(i, `data: ${JSON.stringify({ choices: [{ delta: { content }, ...more }] })}\n\n`); },
    shown: () => byId("log").children.filter((node) => node.textContent && !node.className.includes("facts")).map((node) => [node.className.split(" ")[1], node.textContent]),
    history: () => asked.at(-1).messages.map((message) => [message.role, message.content]),
    isBusy: () => byId("send").hidden && !byId("stop").hidden,
    retry: () => byId("log").querySelectorAll(".retry"),
  };
  return page;
}

async function answered(page, i, ...pieces) {
  page.answers[i].begin();
  for (const piece of pieces) page.delta(i, piece);
  page.say(i, "data: [DONE]\n\n");
  await settled();
}

const scenarios = {
  async two_turns(page) {
    page.send("one"); page.send("ignored while busy");
    const busy = page.isBusy();
    page.answers[0].begin();
    page.say(0, 'data: {"choices": [{"delta": {"content": "a'); await settled();
    page.say(0, 'b"}}]}\n\ndata: {"choices": []}\n'); page.delta(0, "c"); page.say(0, "data: [DONE]\n\n"); await settled();
    page.byId("seed").value = "7"; page.byId("max_tokens").value = "";
    page.send("two");
    const { messages, ...fields } = page.asked[1];
    return { busy, count: page.asked.length, history: page.history(), fields };
  },
  async new_chat_during_an_answer(page) {
    page.send("old"); page.answers[0].isDeaf = true; page.answers[0].begin(); page.delta(0, "old answer"); await settled();
    page.byId("clear").fire("click");
    const idle = !page.isBusy();
    page.send("new"); page.delta(0, " goes on"); page.say(0, "data: [DONE]\n\n"); await settled();
    const busy = page.isBusy();
    await answered(page, 1, "new answer");
    return { idle, busy, shown: page.shown(), history: page.history() };
  },
  async composition(page) {
    page.byId("prompt").value = "にほん";
    const composing = [{ key: "Enter", isComposing: true }, { key: "Enter", keyCode: 229 }, { key: "Enter", shiftKey: true }, { key: "a" }];
    const prevented = composing.map((event) => !!page.byId("prompt").fire("keydown", event).isPrevented);
    const before = page.asked.length;
    page.byId("prompt").fire("keydown", { key: "Enter" });
    return { prevented, before, after: page.asked.length };
  },
  async refused_and_again(page) {
    page.send("hello");
    page.answers[0].begin({ ok: false, status: 400, json: async () => ({ error: { message: "too warm" } }) }); await settled();
    const shown = page.shown(), retry = page.retry().length, busy = page.isBusy();
    page.retry()[0].fire("click");
    await answered(page, 1, "hi");
    const after = page.shown();
    page.send("next");
    return { shown, retry, busy, after, history: page.history(), left: page.retry().length };
  },
  async errors(page) {
    const seen = [];
    const failures = [
      (i) => page.answers[i].refuse(new TypeError("Failed to fetch")),
      (i) => page.answers[i].begin({ ok: false, status: 502, json: async () => { throw new SyntaxError("no JSON"); } }),
      (i) => { page.answers[i].begin(); page.say(i, 'data: {"error": {"message": "the engine stopped"}}\n\n'); },
      (i) => { page.answers[i].begin(); page.answers[i].controller.close(); },
    ];
    for (const [i, fail] of failures.entries()) {
      page.send("try " + i); fail(i); await settled();
      seen.push(page.shown().at(-1));
    }
    page.send("last");
    return { seen, history: page.history(), kinds: page.shown().map(([kind]) => kind) };
  },
  async stopped(page) {
    page.send("count"); page.answers[0].begin(); page.delta(0, "one two"); await settled();
    page.byId("stop").fire("click"); await settled();
    page.send("go on");
    const history = page.history();
    page.byId("stop").fire("click"); await settled();
    return { history, busy: page.isBusy(), shown: page.shown() };
  },
};

(async () => {
  const seen = {};
  for (const [name, scenario] of Object.entries(scenarios)) seen[name] = await scenario(browser());
  console.log(JSON.stringify(seen));
})();
