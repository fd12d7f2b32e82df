// Put into the chat page before its scripts: answers are given by the test, through `window.answers`.
"use strict";
window.answers = [];
const encoder = new TextEncoder(), realFetch = window.fetch;

class Answer {
  constructor(options) {
    this.asked = JSON.parse(options.body);
    this.key = options.headers.authorization ?? null;
    this.isStopped = false;
    this.body = new ReadableStream({ start: (controller) => { this.controller = controller; } });
    this.response = new Promise((resolve, reject) => Object.assign(this, { resolve, reject }));
    options.signal.addEventListener("abort", () => {
      this.isStopped = true;
      this.controller.error(options.signal.reason);
      this.reject(options.signal.reason);
    });
  }

  begin() { this.resolve(new Response(this.body)); }

  refuse(status, body, headers = {}) { this.resolve(new Response(body, { status, headers })); }

  say(text) { this.controller.enqueue(encoder.encode(text)); }

  delta(delta, more = {}) { this.say(`data: ${JSON.stringify({ choices: [{ index: 0, delta, ...more }] })}\n\n`); }

  fail(message) { this.say(`data: ${JSON.stringify({ error: { message } })}\n\n`); }

  end(usage) {
    if (usage) this.say(`data: ${JSON.stringify({ choices: [], usage })}\n\n`);
    this.say("data: [DONE]\n\n");
  }

  whole(...pieces) {
    this.begin();
    for (const content of pieces) this.delta({ content });
    this.end();
  }
}

window.fetch = (path, options) => {
  if (!String(path).endsWith("v1/chat/completions")) return realFetch(path, options);
  const answer = new Answer(options);
  window.answers.push(answer);
  return answer.response;
};
