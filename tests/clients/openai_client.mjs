// OpenAI's client for JavaScript: responses whole, streamed and with tools, and chats with tools.
import assert from "node:assert";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none" });
const parameters = { type: "object", properties: { city: { type: "string" } } };
const named = { name: "get_weather", description: "Weather.", parameters };
const asked = { model: "tiny", tools: [{ type: "function", strict: false, ...named }] };
const input = [{ role: "user", content: "What is the weather in Paris?" }];

const first = await client.responses.create({ ...asked, input });
const call = first.output.at(-1);
assert.equal(call.type, "function_call");
assert.deepEqual(JSON.parse(call.arguments), { city: "Paris" });
input.push(...first.output, {
  type: "function_call_output",
  call_id: call.call_id,
  output: "sunny in Paris",
});
const second = await client.responses.create({ ...asked, input });
assert.equal(second.output_text, "It is sunny.");

let text = "";
const stream = client.responses.stream({ ...asked, input });
stream.on("response.output_text.delta", (event) => (text += event.delta));
const final = await stream.finalResponse();
assert.equal(final.status, "completed");
assert.equal(text, "It is sunny.");
assert.equal(final.output_text, text);

const runner = client.chat.completions.runTools({
  model: "tiny",
  messages: [{ role: "user", content: "What is the weather in Paris?" }],
  tools: [
    {
      type: "function",
      function: { ...named, parse: JSON.parse, function: ({ city }) => `sunny in ${city}` },
    },
  ],
});
assert.equal(await runner.finalContent(), "It is sunny.");
