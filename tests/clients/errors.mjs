// Sends each row of a table (a JSON file: see test_errors_of_sdks.py) with OpenAI's package for Node,
// and prints a line of JSON about what it raises; "begun" once a stream has said something.
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const { url, rows } = JSON.parse(readFileSync(process.argv[2], "utf8"));

async function send(row) {
  const client = new OpenAI({ baseURL: url, apiKey: row.key, maxRetries: 0 });
  const options = {
    body: row.content ?? undefined,
    headers: { "content-type": "application/json" },
    stream: row.stream,
  };
  const answer = await client[row.method.toLowerCase()](row.path, options);
  if (!row.stream) return;
  let begun = false;
  for await (const chunk of answer) {
    if (!begun) console.log("begun");
    begun = true;
  }
}

for (const row of rows) {
  try {
    await send(row);
    console.log(JSON.stringify({ name: row.name, kind: "nothing was raised" }));
  } catch (error) {
    const headers = error.headers ? Object.fromEntries(error.headers) : {};
    const { status, code, param, type } = error;
    const said = { name: row.name, kind: error.constructor.name, status, code, param, type, headers };
    console.log(JSON.stringify({ ...said, message: error.error?.message ?? error.message }));
  }
}
