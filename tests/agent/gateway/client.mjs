// The openai package as anybody uses it: plain, streamed, an exchange with a tool, an error.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "hello" }];
const model = "tiny";
const told = {};

const { data, response } = await client.chat.completions
  .create({ model, messages, store: true, metadata: { session_id: "s" } })
  .withResponse();
told.plain = data.choices[0].message.content;
told.fingerprint = data.system_fingerprint;
told.version = response.headers.get("x-model-version");

told.streamed = "";
const stream = await client.chat.completions.create({
  model, messages, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  told.streamed += chunk.choices[0]?.delta?.content ?? "";
  told.tokens = chunk.usage?.completion_tokens ?? told.tokens;
}

const tools = [{ type: "function", function: { name: "look", parameters: { type: "object" } } }];
const asked = await client.chat.completions.create({ model, messages, tools });
const turn = asked.choices[0].message;
told.tool = turn.tool_calls[0].function.name;
const result = { role: "tool", tool_call_id: turn.tool_calls[0].id, content: "42" };
const end = await client.chat.completions.create({ model, messages: [...messages, turn, result] });
told.after = end.choices[0].message.content;

told.models = (await client.models.list()).data.map((each) => each.id);
try {
  await client.chat.completions.create({ model: "other", messages });
} catch (error) {
  told.error = [error instanceof OpenAI.NotFoundError, error.code];
}
console.log(JSON.stringify(told));
