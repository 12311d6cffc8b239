// The page of `mixoff serve`: a chat through the same endpoint as any client, and the course's grid on a stream.
import grid from "./grid.js";

const $ = (id) => document.getElementById(id);
const headers = () => ({ "Content-Type": "application/json", ...($("key").value && { Authorization: `Bearer ${$("key").value}` }) });
let turns = [], model = "", asked = null;

// calls `fn` with the data of each server-sent event of a response, as text
async function eachEvent(response, fn) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) if (event.startsWith("data: ")) fn(event.slice(6));
  }
}

async function failure(response) {
  const text = await response.text();
  try { return JSON.parse(text).error.message; } catch { return text || response.statusText; }
}

// Chat ----------------------------------------------------------------------------------------------------------------

function show(who, text) {
  const turn = document.createElement("li");
  turn.className = who;
  turn.dataset.who = { user: "You", assistant: model, error: "Error" }[who];
  turn.textContent = text;
  $("turns").append(turn);
  $("turns").scrollTop = 1e9;
  return turn;
}

function request() {
  const system = $("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...turns];
  const body = { model, messages, stream: true, temperature: Number($("temperature").value), max_tokens: Number($("limit").value) };
  if ($("seed").value !== "") body.seed = Number($("seed").value);
  return { method: "POST", headers: headers(), body: JSON.stringify(body), signal: asked.signal };
}

async function answer() {
  const response = await fetch("v1/chat/completions", request());
  if (!response.ok) throw new Error(await failure(response));
  const turn = show("assistant", ""), start = performance.now();
  let tokens = 0;
  try {
    await eachEvent(response, (data) => {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      const text = event.choices[0]?.delta.content;
      if (!text) return;
      const end = $("turns"), follow = end.scrollTop + end.clientHeight > end.scrollHeight - 40;
      turn.textContent += text;
      if (follow) end.scrollTop = 1e9;
      $("speed").textContent = `${(++tokens / ((performance.now() - start) / 1000)).toFixed(1)} pieces/s`;
    });
  } finally {
    turns.push({ role: "assistant", content: turn.textContent });
  }
}

async function send() {
  const question = $("question").value.trim();
  if (!question || asked) return;
  asked = new AbortController();
  turns.push({ role: "user", content: question });
  show("user", question);
  $("question").value = "";
  $("send").disabled = true;
  $("stop").disabled = false;
  try {
    await answer();
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
    if (turns.at(-1).role === "user") turns.pop(); // it was not answered, so it is not part of the conversation
  }
  asked = null;
  $("send").disabled = false;
  $("stop").disabled = true;
  $("question").focus();
}

function reset() {
  asked?.abort();
  turns = [];
  $("turns").replaceChildren();
  $("speed").textContent = "";
  $("question").focus();
}

$("ask").onsubmit = (event) => { event.preventDefault(); send(); };
$("question").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
};
$("stop").onclick = () => asked?.abort();
document.addEventListener("keydown", (event) => { if (event.key === "Escape") asked?.abort(); });
$("reset").onclick = reset;

// Grid ----------------------------------------------------------------------------------------------------------------

// what the widget asks of a notebook's kernel: values by name, and word of a change
function widgetModel(values) {
  const handlers = {};
  return {
    get: (name) => values[name],
    set: (name, value) => { values[name] = value; (handlers[`change:${name}`] ?? []).forEach((fn) => fn()); },
    on: (name, fn) => (handlers[name] ??= []).push(fn),
    off: () => {},
  };
}

async function watch() {
  const response = await fetch("grid", { headers: headers() });
  if (!response.ok) throw new Error(await failure(response));
  let state = null;
  await eachEvent(response, (data) => {
    const event = JSON.parse(data);
    if (state) return state.set("live", event);
    state = widgetModel({ ...event, live: {}, recording: {} });
    grid.render({ model: state, el: $("grid") });
    $("state").textContent = "connected";
  });
}

async function connect() {
  for (;;) {
    try {
      const response = await fetch("v1/models", { headers: headers() });
      if (!response.ok) throw new Error(await failure(response));
      const [first] = (await response.json()).data;
      model = first.id;
      $("model").textContent = model;
      await watch();
      $("state").textContent = "connection ended";
    } catch (error) {
      $("state").textContent = error.message;
    }
    await new Promise((done) => { setTimeout(done, 2000); $("key").onchange = done; });
  }
}

$("key").value = sessionStorage.getItem("mixoff-key") ?? "";
$("key").addEventListener("input", () => sessionStorage.setItem("mixoff-key", $("key").value));
connect();
