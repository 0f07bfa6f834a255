// A chat request as the programs that send it: what they print is the answer as it comes.

export const samples = { curl, python, node };

const indented = (text, spaces) => text.replaceAll("\n", `\n${" ".repeat(spaces)}`);

function curl(base, body) {
  const json = JSON.stringify({ ...body, stream: true }, null, 2).replaceAll("'", "'\\''");
  return [
    `curl -N '${base.replaceAll("'", "'\\''")}/chat/completions' \\`,
    '  -H "Authorization: Bearer $PINAIVU_API_KEY" \\',
    "  -H 'Content-Type: application/json' \\",
    `  -d '${json}'`,
    "",
  ].join("\n");
}

function python(base, body) {
  const fields = Object.entries({ ...body, stream: true })
    .map(([name, value]) => `    ${name}=${indented(pythonText(value), 4)},`);
  return [
    "import os",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${pythonText(base)}, api_key=os.environ["PINAIVU_API_KEY"])`,
    "stream = client.chat.completions.create(",
    ...fields,
    ")",
    "for chunk in stream:",
    "    if chunk.choices:",
    '        print(chunk.choices[0].delta.content or "", end="", flush=True)',
    "",
  ].join("\n");
}

/** A value of JSON as Python writes it. */
function pythonText(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const isList = Array.isArray(value);
  const parts = isList
    ? value.map((each) => pythonText(each))
    : Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${pythonText(each)}`);
  const [begin, end] = isList ? ["[", "]"] : ["{", "}"];
  const line = `${begin}${parts.join(", ")}${end}`;
  if (line.length <= 72 && !line.includes("\n")) return line;
  return `${begin}\n${parts.map((part) => `    ${indented(part, 4)},`).join("\n")}\n${end}`;
}

function node(base, body) {
  const json = JSON.stringify({ ...body, stream: true }, null, 2).replace(/"(\w+)":/g, "$1:");
  return [
    'import OpenAI from "openai";',
    "",
    "const client = new OpenAI({",
    `  baseURL: ${JSON.stringify(base)},`,
    "  apiKey: process.env.PINAIVU_API_KEY,",
    "});",
    `const stream = await client.chat.completions.create(${json});`,
    "for await (const chunk of stream) {",
    '  process.stdout.write(chunk.choices[0]?.delta?.content ?? "");',
    "}",
    "",
  ].join("\n");
}
