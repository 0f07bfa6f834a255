// The list of endpoints, drawn from openapi.json.  What is folded is drawn when it is first opened.

import { byId, element } from "./page.js";

const JSON_KIND = "application/json";
const BOUNDS = [
  "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
  "minLength", "maxLength", "minItems", "maxItems", "pattern",
];

/** A `<details>`; `draw` gives the nodes inside, once. */
function folded(summary, draw) {
  const box = element("details");
  box.append(summary);
  box.addEventListener("toggle", () => {
    if (!box.open || box.children.length > 1) return;
    box.append(element("div", { class: "docs-inside" }, draw()));
  });
  return box;
}

const nameOf = (reference) => reference.split("/").pop();

/** A schema in one line. */
function inWords(schema) {
  if (typeof schema !== "object" || schema === null) return "any";
  if (schema.$ref) return nameOf(schema.$ref);
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(" | ");
  const choices = schema.anyOf || schema.oneOf;
  if (choices) return choices.map(inWords).join(" | ");
  if (schema.type === "array") return `[${schema.items ? inWords(schema.items) : "any"}]`;
  if (typeof schema.additionalProperties === "object" && !schema.properties) {
    return `{name: ${inWords(schema.additionalProperties)}}`;
  }
  const bounds = BOUNDS.filter((key) => key in schema).map((key) => `${key} ${schema[key]}`);
  return [schema.type || "any", ...bounds].join(", ");
}

/** Rows of a name (required ones with an asterisk) and what may stand there. */
function table(rows) {
  const made = element("table");
  for (const { name, required, where, schema } of rows) {
    const row = made.insertRow();
    row.insertCell().append(element("code", {}, name + (required ? " *" : "")));
    const cell = row.insertCell();
    if (where) cell.append(`in the ${where}: `);
    cell.append(element("code", {}, inWords(schema)));
    if (schema && typeof schema === "object" && "default" in schema) {
      cell.append(element("span", { class: "muted" }, ` default ${JSON.stringify(schema.default)}`));
    }
  }
  return rows.length ? [made] : [];
}

/** A type, and the types that it names; `above` are those that it is in. */
function type(title, schema, schemas, above = []) {
  const found = (schema.$ref ? schemas[nameOf(schema.$ref)] : schema) || {};
  return folded(element("summary", {}, `${title}: ${inWords(schema)}`), () => {
    const required = new Set(found.required || []);
    const fields = Object.entries(found.properties || {}).map(
      ([name, field]) => ({ name, required: required.has(name), schema: field }),
    );
    const named = new Set(JSON.stringify(found).match(/#\/components\/schemas\/[\w.-]+/g) || []);
    const inner = [...named].filter((reference) => !above.includes(reference));
    return [
      ...(found.description ? [element("p", {}, found.description)] : []),
      ...table(fields),
      ...inner.map(($ref) => type("type", { $ref }, schemas, [...above, $ref])),
    ];
  });
}

/** What is sent or answered, in each media type that it may have. */
function contents(title, content, schemas) {
  return Object.entries(content || {}).map(([kind, media]) => {
    const schema = media.schema || {};
    const name = kind === JSON_KIND ? title : `${title} as ${kind}`;
    if (!schema.$ref && !schema.properties) return element("p", {}, `${name}: ${inWords(schema)}`);
    return type(name, schema, schemas, schema.$ref ? [schema.$ref] : []);
  });
}

function details(one, schemas) {
  try {
    const parameters = (one.parameters || []).map(
      ({ name, required, in: where, schema }) => ({ name, required, where, schema }),
    );
    const nodes = [...table(parameters), ...contents("body", one.requestBody?.content, schemas)];
    const errors = [];
    for (const [status, answer] of Object.entries(one.responses || {})) {
      if (status.startsWith("2")) nodes.push(...contents("answer", answer.content, schemas));
      else errors.push(element("p", { class: "muted" }, `${status}: ${answer.description}`));
    }
    if (errors.length) nodes.push(folded(element("summary", {}, "errors"), () => errors));
    return nodes;
  } catch {  // what cannot be drawn is shown as it is, and stops nothing else
    return [element("pre", {}, JSON.stringify(one, null, 2))];
  }
}

function operation(method, path, one, schemas) {
  const head = element(
    "summary", {},
    element("span", { class: "docs-method" }, method), element("code", { class: "plain" }, path),
  );
  if (one?.summary) head.append(element("span", { class: "docs-summary" }, one.summary));
  const box = folded(head, () => details(one, schemas));
  box.className = "docs-operation";
  box.id = one?.operationId || `${method}-${path}`;
  box.addEventListener("toggle", () => {
    if (box.open) history.replaceState(null, "", `#${encodeURIComponent(box.id)}`);
  });
  const types = JSON.stringify(one).match(/schemas\/[\w.-]+/g) || [];
  const fields = types.flatMap((name) => Object.keys(schemas[nameOf(name)]?.properties || {}));
  const parameters = (one?.parameters || []).map(({ name }) => name);
  const words = [method, path, one?.summary, box.id, ...types.map(nameOf), ...fields, ...parameters];
  return { box, text: words.join(" ").toLowerCase() };
}

/** What a path is about: `/v1/admin/keys/{key_id}` is about `/v1/admin/keys`, `/api/…` is Ollama's. */
function groupOf(path) {
  const parts = path.split("/").slice(1);
  if (parts[0] === "api") return "Ollama";
  const length = parts[1] === "admin" || parts[1] === "account" ? 3 : 2;
  return `/${parts.slice(0, length).filter((part) => !part.startsWith("{")).join("/")}`;
}

function draw(place, api) {
  const schemas = api.components?.schemas || {};
  const groups = new Map();
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, one] of Object.entries(methods)) {
      const name = groupOf(path);
      if (!groups.has(name)) groups.set(name, []);
      groups.get(name).push(operation(method, path, one, schemas));
    }
  }
  const sections = [...groups].map(([name, operations]) => {
    const section = element("section", { class: "card flush docs-group" });
    section.append(element("h2", {}, name), ...operations.map(({ box }) => box));
    return { section, operations };
  });
  place.replaceChildren(...sections.map(({ section }) => section));
  return sections;
}

/** Shows the operations that have all the words; returns how many. */
function filter(sections, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const { section, operations } of sections) {
    let inSection = 0;
    for (const { box, text } of operations) {
      box.hidden = !words.every((word) => text.includes(word));
      if (!box.hidden) inSection += 1;
    }
    section.hidden = inSection === 0;
    shown += inSection;
  }
  return shown;
}

function openFromAddress() {
  let id = location.hash.slice(1);
  try { id = decodeURIComponent(id); } catch { /* written by hand: as it is */ }
  const box = byId(id);
  if (!box?.classList.contains("docs-operation")) return;
  box.open = true;
  box.scrollIntoView();
}

async function main() {
  const place = byId("docs-operations");
  const count = byId("docs-count");
  const query = byId("docs-query");
  const search = byId("docs-search");
  let sections;
  try {
    const answer = await fetch(place.dataset.document);
    if (!answer.ok) throw new Error(`the box answered ${answer.status}`);
    sections = draw(place, await answer.json());
  } catch (error) {
    const sentence = `The description could not be shown: ${error.message}.`;
    place.replaceChildren(element("p", { class: "error" }, sentence));
    return;
  }
  const show = () => {
    const shown = filter(sections, query.value);
    const all = sections.reduce((sum, { operations }) => sum + operations.length, 0);
    count.textContent = shown === all ? `${all} endpoints` : `${shown} of ${all} endpoints`;
  };
  search.hidden = false;
  search.addEventListener("submit", (event) => event.preventDefault());
  query.addEventListener("input", show);
  show();
  openFromAddress();
  window.addEventListener("hashchange", openFromAddress);
}

main();
