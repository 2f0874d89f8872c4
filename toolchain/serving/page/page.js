"use strict";

// Looks at /stats each second. All that is told there are counts that grow: what is drawn is what they grew by.

const SECONDS = 120; // shown
const WINDOW = 5; // over which percentiles are taken
const $ = (id) => document.getElementById(id);
const looks = []; // answers of /stats, oldest first
let chosen = null; // "model/version", or null for all of them
let token = sessionStorage.getItem("token") || "";

const key = (model) => `${model.name}/${model.version}`;

function headers() {
  return token ? { authorization: `Bearer ${token}` } : {};
}

function tell(text) {
  $("told").textContent = text;
  $("told").hidden = !text;
}

async function look() {
  try {
    const answer = await fetch("stats", { headers: headers(), cache: "no-store" });
    if (answer.status === 401 || answer.status === 403) {
      $("token-form").hidden = false;
      $("dot").className = "dot waiting";
      $("summary").textContent = "the server asks for a token";
      tell(token ? (await answer.json()).error : "");
      return;
    }
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    looks.push(await answer.json());
    while (looks.length > SECONDS + WINDOW + 1) looks.shift();
    $("token-form").hidden = true;
    tell("");
    show();
  } catch (error) {
    $("dot").className = "dot gone";
    $("summary").textContent = "the server does not answer";
  }
}

// What a version's counts grew by between two looks; null where one of them does not have it.
function grown(from, to, wanted) {
  const sum = { seconds: to.time - from.time, success: 0, failed: 0, rows: 0, runs: 0, counts: to.bounds.map(() => 0).concat(0) };
  let any = false;
  for (const now of to.models) {
    if (wanted && key(now) !== wanted) continue;
    const then = from.models.find((m) => key(m) === key(now));
    // A worker that was restarted counts from nothing: a count that fell is no growth.
    const by = (a, b) => Math.max(0, a - b);
    any = true;
    for (const name of ["success", "failed", "rows", "runs"]) sum[name] += by(now[name], then ? then[name] : 0);
    now.seconds.forEach((count, i) => { sum.counts[i] += by(count, then ? then.seconds[i] : 0); });
  }
  return any && sum.seconds > 0 ? sum : null;
}

// The value below which a share of what a histogram counts lies, by a straight line within its class.
function quantile(bounds, counts, share) {
  const total = counts.reduce((a, b) => a + b, 0);
  if (!total) return null;
  let left = share * total;
  for (let i = 0; i < counts.length; i++) {
    if (left <= counts[i] && counts[i] > 0) {
      if (i >= bounds.length) return bounds[bounds.length - 1];
      const low = i ? bounds[i - 1] : 0;
      return low + (bounds[i] - low) * (left / counts[i]);
    }
    left -= counts[i];
  }
  return bounds[bounds.length - 1];
}

function duration(seconds) {
  if (seconds === null) return "–";
  if (seconds >= 1) return `${seconds.toPrecision(3)} s`;
  if (seconds >= 1e-3) return `${(seconds * 1e3).toPrecision(3)} ms`;
  return `${Math.round(seconds * 1e6)} µs`;
}

function amount(value) {
  return value >= 100 || value === 0 ? Math.round(value).toLocaleString("en") : value.toPrecision(3);
}

function bytes(value) {
  return value >= 2 ** 30 ? `${(value / 2 ** 30).toFixed(2)} GiB` : `${Math.round(value / 2 ** 20)} MiB`;
}

function before(steps) {
  return looks[Math.max(0, looks.length - 1 - steps)];
}

function show() {
  const now = looks[looks.length - 1];
  const ready = now.models.filter((m) => m.state === "READY").length;
  $("dot").className = ready ? "dot ready" : "dot waiting";
  const memory = now.cap ? `${bytes(now.resident)} of ${bytes(now.cap)}` : bytes(now.resident);
  const workers = now.workers > 1 ? `, ${now.workers} workers` : "";
  $("summary").textContent = `${ready} of ${now.models.length} versions ready, ${memory} in memory${workers}`;
  table(now);
  options(now);
  plots();
}

function cell(row, text, name) {
  const made = row.insertCell();
  if (name) {
    const badge = document.createElement("span");
    badge.className = `state ${name}`;
    badge.textContent = text;
    made.append(badge);
  } else {
    made.textContent = text;
  }
  return made;
}

function table(now) {
  const body = document.createElement("tbody");
  body.id = "models";
  for (const model of now.models) {
    const row = body.insertRow();
    const mine = key(model);
    row.className = mine === chosen ? "chosen" : "";
    row.title = "click to plot this one alone";
    row.onclick = () => { chosen = chosen === mine ? null : mine; show(); };
    const lately = grown(before(WINDOW), now, mine);
    cell(row, model.name).title = model.name;
    cell(row, model.version);
    cell(row, model.state.toLowerCase(), model.state);
    cell(row, lately ? amount(lately.success / lately.seconds) : "–");
    cell(row, duration(lately && quantile(now.bounds, lately.counts, 0.5)));
    cell(row, duration(lately && quantile(now.bounds, lately.counts, 0.99)));
    cell(row, amount(model.pending));
    cell(row, lately && lately.runs ? (lately.rows / lately.runs).toFixed(1) : "–");
    cell(row, amount(model.success));
    cell(row, amount(model.failed));
    if (model.reason) {
      const why = cell(body.insertRow(), model.reason);
      why.colSpan = 10;
      why.className = "reason";
    }
  }
  $("models").replaceWith(body);
}

function options(now) {
  const names = [...new Set(now.models.map((m) => m.name))];
  const select = $("which");
  if ([...select.options].map((o) => o.value).join("\n") === names.join("\n")) return;
  const kept = select.value;
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  if (names.includes(kept)) select.value = kept;
}

function plots() {
  const bounds = looks[looks.length - 1].bounds;
  const p50 = [], p99 = [], rate = [], failed = [];
  for (let i = 1; i < looks.length; i++) {
    const at = looks[i].time - looks[looks.length - 1].time;
    const one = grown(looks[i - 1], looks[i], chosen);
    const some = grown(looks[Math.max(0, i - WINDOW)], looks[i], chosen);
    rate.push([at, one ? one.success / one.seconds : null]);
    failed.push([at, one ? one.failed / one.seconds : null]);
    p50.push([at, some && quantile(bounds, some.counts, 0.5)]);
    p99.push([at, some && quantile(bounds, some.counts, 0.99)]);
  }
  const last = (line) => (line.length ? line[line.length - 1][1] : null);
  const of = chosen ? `${chosen} · ` : "";
  $("latency-now").textContent = last(p50) === null ? of : `${of}p50 ${duration(last(p50))}, p99 ${duration(last(p99))}`;
  $("rate-now").textContent = last(rate) === null ? of : `${of}${amount(last(rate))} a second`;
  plot($("latency"), [[p50, "--blue"], [p99, "--orange"]], duration);
  plot($("rate"), [[rate, "--blue"], [failed, "--red"]], amount);
}

function plot(canvas, lines, label) {
  const style = getComputedStyle(document.documentElement);
  const scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.font = "12px system-ui, sans-serif";
  const values = lines.flatMap(([line]) => line.map(([, value]) => value)).filter((value) => value !== null);
  const step = rounded(Math.max(...values, 1e-9) / 4);
  const most = step * Math.ceil(Math.max(...values, 1e-9) / step);
  const left = 62, right = 8, top = 8, bottom = 20;
  const x = (at) => left + (width - left - right) * (1 + at / SECONDS);
  const y = (value) => height - bottom - (height - top - bottom) * (value / most);
  pen.strokeStyle = style.getPropertyValue("--line");
  pen.fillStyle = style.getPropertyValue("--soft");
  pen.lineWidth = 1;
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  for (let value = 0; value <= most * 1.001; value += step) {
    pen.beginPath();
    pen.moveTo(left, Math.round(y(value)) + 0.5);
    pen.lineTo(width - right, Math.round(y(value)) + 0.5);
    pen.stroke();
    // of an axis, "10 ms" says as much as "10.0 ms"
    if (values.length) {
      const text = label(Number(value.toPrecision(3))).replace(/\.0+(?=\D|$)|(?<=\.\d)0(?=\D|$)/, "");
      pen.fillText(value ? text : "0", left - 8, y(value));
    }
  }
  pen.textBaseline = "alphabetic";
  for (const at of [-120, -90, -60, -30, 0]) {
    pen.textAlign = at === 0 ? "right" : at === -120 ? "left" : "center";
    pen.fillText(at ? `${at} s` : "now", x(at), height - 4);
  }
  pen.save();
  pen.beginPath();
  pen.rect(left, 0, width - left, height);
  pen.clip();
  pen.lineWidth = 2;
  pen.lineJoin = "round";
  for (const [line, colour] of lines) {
    pen.strokeStyle = style.getPropertyValue(colour);
    pen.beginPath();
    let down = false;
    for (const [at, value] of line) {
      if (value === null) { down = false; continue; }
      if (down) pen.lineTo(x(at), y(value)); else pen.moveTo(x(at), y(value));
      down = true;
    }
    pen.stroke();
  }
  pen.restore();
}

// 1, 2 or 5 times a power of ten, no less than the value.
function rounded(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((m) => m * power >= value * 0.999) * power;
}

async function classify(file) {
  if (!file) return;
  const answer = $("answer");
  const url = URL.createObjectURL(file);
  $("picture").onload = () => URL.revokeObjectURL(url);
  $("picture").src = url;
  $("picture").hidden = false;
  $("invite").hidden = true;
  answer.className = "";
  answer.textContent = "…";
  const begun = performance.now();
  try {
    const form = new FormData();
    form.append("image", file);
    const url = `predict/${encodeURIComponent($("which").value)}?top=5&outputs=false`;
    const reply = await fetch(url, { method: "POST", body: form, headers: headers() });
    const told = await reply.json();
    if (!reply.ok) throw new Error(told.error || `the server answered ${reply.status}`);
    bars(told, performance.now() - begun);
  } catch (error) {
    answer.className = "error";
    answer.textContent = error.message;
  }
}

function bars(told, ms) {
  const answer = $("answer");
  const top = (told.classes || [])[0];
  if (!top || !top.length) {
    answer.replaceChildren(document.createElement("pre"));
    answer.firstChild.textContent = JSON.stringify(told, null, 1).slice(0, 4000);
    return;
  }
  const made = top.map((entry) => {
    const score = entry.probability ?? entry.score ?? 0;
    const row = document.createElement("div");
    row.className = "bar";
    const name = document.createElement("span");
    name.textContent = name.title = entry.label ?? `class ${entry.class ?? entry.index}`;
    const bar = document.createElement("i");
    bar.style.width = `${Math.max(0, Math.min(1, score)) * 100}%`;
    const number = document.createElement("span");
    number.textContent = `${(score * 100).toFixed(1)} %`;
    row.append(name, bar, number);
    return row;
  });
  const note = document.createElement("p");
  note.textContent = `${told.model} version ${told.version}, ${duration(ms / 1000)} there and back; probabilities: ${told.probabilities}`;
  answer.replaceChildren(...made, note);
}

$("token-form").onsubmit = (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  sessionStorage.setItem("token", token);
  look();
};
$("file").onchange = () => classify($("file").files[0]);
for (const name of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") classify(event.dataTransfer.files[0]);
  });
}
$("drop").addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === " ") $("file").click();
});
window.addEventListener("resize", () => { if (looks.length) plots(); });
look();
setInterval(look, 1000);
