"use strict";
// An answer as it comes. A turn fills the last message of its conversation, whichever conversation is shown.

class Turn {
  /** changed(turn): something came; ended(turn, problem): problem is null if all went well. */
  constructor(conversation, body, key, changed, ended) {
    this.conversation = conversation;
    this.message = { role: "assistant", content: "" };
    conversation.messages.push(this.message);
    this.controller = new AbortController();
    this.began = performance.now();
    this.firstAt = this.lastAt = null;
    this.figures = { tokens: 0 };
    this.run(body, key, changed, ended);
  }

  stop() { this.controller.abort(); }

  async run(body, key, changed, ended) {
    let problem = null;
    try {
      for await (const event of answerEvents(body, key, this.controller.signal)) {
        if (this.take(event)) changed(this);
      }
    } catch (error) {
      problem = error instanceof Problem ? error : new Problem("broken", String(error.message ?? error));
    }
    ended(this, this.finish(problem));
  }

  /** Whether there is something new to show. */
  take(event) {
    const choice = event.choices?.find(({ index = 0 }) => index === 0);
    const { content, reasoning, tool_calls: calls } = choice?.delta ?? {};
    if (choice?.finish_reason) this.message.ended = choice.finish_reason;
    if (event.usage) this.takeUsage(event.usage);
    if (!content && !reasoning && !calls) return Boolean(event.usage);
    this.lastAt = performance.now();
    this.firstAt ??= this.lastAt;
    this.figures.tokens += 1;
    if (content) this.message.content += content;
    if (reasoning) this.message.reasoning = (this.message.reasoning ?? "") + reasoning;
    if (this.message.reasoning && !this.message.content) this.figures.thoughtMs = this.lastAt - this.firstAt;
    for (const call of calls ?? []) this.takeCall(call);
    this.figures.firstMs = this.firstAt - this.began;
    this.figures.restMs = this.lastAt - this.firstAt;
    this.message.figures = this.figures;
    return true;
  }

  takeCall({ index, id, function: part }) {
    this.message.tool_calls ??= [];
    const call = (this.message.tool_calls[index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
    if (id) call.id = id;
    call.function.name += part?.name ?? "";
    call.function.arguments += part?.arguments ?? "";
  }

  takeUsage(usage) {
    this.figures.tokens = usage.completion_tokens;
    this.figures.promptTokens = usage.prompt_tokens;
    this.figures.cachedTokens = usage.prompt_tokens_details?.cached_tokens;
  }

  /** Removes a message in which nothing came. Returns the problem to show, or null. */
  finish(problem) {
    const { message, conversation } = this;
    if (problem?.kind === "stopped") message.ended = "stopped";
    if (message.content || message.reasoning || message.tool_calls) return problem;
    conversation.messages = conversation.messages.filter((one) => one !== message);
    return problem ?? new Problem("empty", "the model answered nothing");
  }
}

// -- figures -------------------------------------------------------------------------------------

function answerFacts({ figures, ended }) {
  if (figures?.firstMs === undefined) return ended === "stopped" ? "stopped" : "";
  const { firstMs, restMs, tokens } = figures;
  const rate = tokens > 1 && restMs > 0 ? ((tokens - 1) / (restMs / 1000)).toFixed(1) : "–";
  const facts = [`first token ${firstMs.toFixed(0)} ms`, `${tokens} tokens`, `${rate} tokens/s`];
  if (ended === "length") facts.push("cut off");
  if (ended === "stopped") facts.push("stopped");
  return facts.join(" · ");
}

function promptFacts({ figures }) {
  if (figures?.promptTokens === undefined) return "";
  const cached = figures.cachedTokens;
  return `prompt ${figures.promptTokens} tokens` + (cached ? `, ${cached} cached` : "");
}

function thoughtLabel({ content, figures }, isComing) {
  if (isComing && !content) return "Thinking…";
  const seconds = (figures?.thoughtMs ?? 0) / 1000;
  return seconds >= 1 ? `Thought for ${seconds.toFixed(seconds < 10 ? 1 : 0)} s` : "Reasoning";
}
