"use strict";

// Shows openapi.json: what can be asked, a line of curl for it, and a button that asks.

const $ = (id) => document.getElementById(id);

function make(kind, properties = {}, ...children) {
  const made = Object.assign(document.createElement(kind), properties);
  made.append(...children);
  return made;
}

// What is short stands on one line, and so do rows of numbers however long.
function json(value, indent = "") {
  const flat = JSON.stringify(value).replaceAll(",\"", ", \"").replaceAll("\":", "\": ");
  if (flat.length < 90 || typeof value !== "object" || (Array.isArray(value) && value.every((one) => typeof one !== "object"))) return flat;
  const inner = `${indent}  `;
  const parts = Array.isArray(value) ? value.map((one) => json(one, inner))
    : Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${json(one, inner)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  return `${open}\n${inner}${parts.join(`,\n${inner}`)}\n${indent}${close}`;
}

// Example bodies by content type; an operation may have several of JSON.
function examples(operation) {
  const found = [];
  for (const [kind, content] of Object.entries(operation.requestBody?.content || {})) {
    const all = content.examples ? Object.entries(content.examples).map(([name, one]) => [name, one.value]) : [];
    if (content.example !== undefined) all.push(["", content.example]);
    if (!all.length) found.push({ kind, name: kind });
    for (const [name, value] of all) found.push({ kind, name: name ? `${kind}: ${name}` : kind, value });
  }
  return found;
}

function operationOf(path, method, operation) {
  const fields = {}; // name → [parameter, input]
  const table = make("div", { className: "fields" });
  for (const one of operation.parameters || []) {
    const choices = one.schema?.enum || (one.schema?.type === "boolean" ? ["true", "false"] : null);
    const input = choices ? make("select", {}, ...choices.map((text) => new Option(text, text)))
      : make("input", { autocomplete: "off", spellcheck: false });
    if (one.schema?.default !== undefined) input.value = String(one.schema.default);
    if (one.in === "path" && one.name === "model") input.value = $("model").value;
    fields[one.name] = [one, input];
    table.append(make("label", { textContent: one.name }), input, make("small", { textContent: one.description || "" }));
  }
  const bodies = examples(operation);
  const which = make("select", {}, ...bodies.map((one, i) => new Option(one.name, i)));
  const text = make("textarea", { rows: 6, spellcheck: false });
  const file = make("input", { type: "file", accept: "image/png,image/jpeg" });
  const line = make("pre", { className: "curl" });
  const answer = make("pre", { className: "answer", hidden: true });
  const send = make("button", { type: "button", textContent: "send" });

  const body = () => bodies[Number(which.value) || 0];
  const isFile = () => body() && body().value === undefined && !body().kind.endsWith("json");
  function url() {
    const query = new URLSearchParams();
    const filled = path.replace(/\{(\w+)\}/g, (whole, name) => encodeURIComponent(fields[name]?.[1].value || "") || whole);
    for (const [name, [one, input]] of Object.entries(fields)) {
      if (one.in === "query" && input.value !== String(one.schema?.default ?? "")) query.set(name, input.value);
    }
    return filled + (query.size ? `?${query}` : "");
  }
  function tell() {
    const quoted = (value) => `'${value.replaceAll("'", "'\\''")}'`;
    const parts = ["curl"];
    if ($("token").value) parts.push('-H "Authorization: Bearer $TOKEN"');
    if (isFile()) {
      const form = body().kind === "multipart/form-data";
      parts.push(form ? "-F image=@cat.jpg" : `-H 'Content-Type: ${body().kind}' --data-binary @cat${body().kind.endsWith("png") ? ".png" : ".jpg"}`);
    } else if (body()) {
      parts.push(`-d ${quoted(text.value.replace(/\s*\n\s*/g, " "))}`);
    } else if (method !== "get") {
      parts.push(`-X ${method.toUpperCase()}`);
    }
    line.textContent = [...parts, quoted(location.origin + url())].join(" ");
  }
  function chosen() {
    text.hidden = !body() || isFile();
    file.hidden = !isFile();
    if (!text.hidden) text.value = json(body().value);
    tell();
  }
  send.onclick = async () => {
    answer.hidden = false;
    answer.textContent = "…";
    const headers = $("token").value ? { authorization: `Bearer ${$("token").value}` } : {};
    let content;
    if (isFile()) {
      content = file.files[0];
      if (!content) { answer.textContent = "choose a file first"; return; }
      if (body().kind === "multipart/form-data") {
        content = new FormData();
        content.append("image", file.files[0]);
      }
    } else if (body()) {
      content = text.value;
      headers["content-type"] = body().kind;
    }
    const begun = performance.now();
    try {
      const reply = await fetch(url().slice(1), { method: method.toUpperCase(), headers, body: content });
      const told = await reply.text();
      let shown = told;
      try { shown = json(JSON.parse(told)); } catch { /* it is no JSON, and is shown as it is */ }
      answer.textContent = `${reply.status} ${reply.statusText}, ${(performance.now() - begun).toFixed(1)} ms\n${shown.slice(0, 20000)}`;
    } catch (error) {
      answer.textContent = `no answer: ${error.message}`;
    }
  };
  which.onchange = chosen;
  which.hidden = bodies.length < 2;
  table.oninput = text.oninput = tell;

  const says = make("div", { className: "says" });
  if (operation.requestBody?.description) says.append(make("p", { textContent: operation.requestBody.description.replaceAll("`", "") }));
  says.append(table, make("div", { className: "body" }, which, text, file), line, send, answer);
  for (const [status, response] of Object.entries(operation.responses || {})) {
    const example = response.content?.["application/json"]?.example;
    if (example === undefined) continue;
    says.append(make("p", { textContent: `${status}: ${response.description}` }), make("pre", { textContent: json(example) }));
  }
  const made = make("details", { id: operation.operationId },
    make("summary", {},
      make("span", { className: `method ${method}`, textContent: method.toUpperCase() }),
      make("code", { textContent: path }),
      make("small", { textContent: operation.summary || "" })),
    says);
  made.ontoggle = () => {
    const model = fields.model?.[1];
    if (model && !model.value) model.value = $("model").value;
    chosen();
  };
  return { made, model: fields.model?.[1], tell };
}

async function begin() {
  const told = await (await fetch("openapi.json")).json();
  $("summary").textContent = `${told.info.title} ${told.info.version}: ${told.info.summary}`;
  const sections = new Map();
  const shown = [];
  for (const [path, methods] of Object.entries(told.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const tag = (operation.tags || ["Others"])[0];
      if (!sections.has(tag)) sections.set(tag, make("section", { className: "wide" }, make("h2", { textContent: tag })));
      const one = operationOf(path, method, operation);
      sections.get(tag).append(one.made);
      shown.push(one);
    }
  }
  $("operations").replaceChildren(...sections.values());
  $("token").value = sessionStorage.getItem("token") || "";
  const spread = () => {
    for (const { model, tell } of shown) {
      if (model) model.value = $("model").value;
      tell();
    }
  };
  $("model").oninput = spread;
  $("token").oninput = () => {
    sessionStorage.setItem("token", $("token").value);
    spread();
  };
  $("token-form").onsubmit = (event) => event.preventDefault();
  const health = await (await fetch("health")).json();
  const names = Object.keys(health.models);
  $("names").replaceChildren(...names.map((name) => new Option(name)));
  if (names.length && !$("model").value) $("model").value = names[0];
  spread();
}

begin().catch((error) => { $("summary").textContent = `the description cannot be read: ${error.message}`; });
