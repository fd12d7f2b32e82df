"use strict";
// The server's API: what is asked, the stream of an answer, and errors in words for a reader.

/** An error for the reader. kind: stopped, unreachable, broken, key, busy, model or refused. */
class Problem extends Error {
  constructor(kind, message) { super(message); this.kind = kind; }
}

async function request(path, key, options = {}) {
  const headers = { ...options.headers, ...(key && { authorization: "Bearer " + key }) };
  let response;
  try {
    response = await fetch(BASE + path, { ...options, headers });
  } catch (error) { // browsers each have their own words for it
    throw error.name === "AbortError" ? new Problem("stopped", "stopped") : new Problem("unreachable", "the server cannot be reached");
  }
  if (!response.ok) throw await problemOf(response);
  return response;
}

async function problemOf(response) {
  const { status } = response;
  let message = `the server answered ${status}`, code;
  try { ({ message = message, code } = (await response.json()).error); } catch { /* a proxy's words are none of ours */ }
  if (status === 401) return new Problem("key", "this server asks for an API key");
  if (status === 429 || status === 503) {
    const after = Number(response.headers?.get("retry-after"));
    return new Problem("busy", `the server is busy: ${message}` + (after > 0 ? ` (try again in ${after} s)` : ""));
  }
  if (status === 404) return new Problem("model", message);
  const isTooLong = status === 400 && /max_model_len|KV cache|context/.test(message);
  return new Problem("refused", message + (isTooLong ? ". Start a new chat, or edit an earlier message." : ""));
}

async function modelNames(key) {
  const { data } = await (await request("v1/models", key)).json();
  return data.map((model) => model.id);
}

/** The events of an answer. Throws Problem, also where the stream ends too early. */
async function* answerEvents(body, key, signal) {
  const options = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal };
  const response = await request("v1/chat/completions", key, options);
  try {
    for await (const data of eventData(response)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Problem("broken", event.error.message);
      yield event;
    }
  } catch (error) {
    if (error instanceof Problem) throw error;
    if (error.name === "AbortError") throw new Problem("stopped", "stopped");
  }
  throw new Problem("broken", "the answer broke off");
}

async function* eventData(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}

// -- bodies --------------------------------------------------------------------------------------

/** The messages that are sent: questions without an answer are left out, but for the last. */
function messagesToSend({ system, messages }) {
  const sent = system ? [{ role: "system", content: system }] : [];
  for (const [index, message] of messages.entries()) {
    const { role, content, tool_calls, tool_call_id } = message;
    const isAnswer = (next) => next?.role === "assistant" && (next.content || next.tool_calls);
    if (role === "user" && index < messages.length - 1 && !isAnswer(messages[index + 1])) continue;
    if (role === "assistant" && !isAnswer(message)) continue;
    sent.push({ role, content, ...(tool_calls && { tool_calls }), ...(role === "tool" && { tool_call_id }) });
  }
  return sent;
}

/** settings: texts of the fields. Throws Problem for further fields that are no JSON object. */
function requestBody(conversation, settings, model) {
  const body = { messages: messagesToSend(conversation), stream: true, stream_options: { include_usage: true } };
  if (model) body.model = model;
  for (const name of ["temperature", "top_p", "top_k", "min_p", "seed"]) if (settings[name]) body[name] = Number(settings[name]);
  if (settings.max_tokens) body.max_completion_tokens = Number(settings.max_tokens);
  if (settings.reasoning_effort) body.reasoning_effort = settings.reasoning_effort;
  return { ...furtherFields(settings.further), ...body };
}

function furtherFields(text) {
  if (!text?.trim()) return {};
  let fields;
  try { fields = JSON.parse(text); } catch (error) { throw new Problem("refused", `further fields are no JSON: ${error.message}`); }
  if (fields?.constructor !== Object) throw new Problem("refused", 'further fields must be a JSON object, such as {"stop": ["END"]}');
  return fields;
}
