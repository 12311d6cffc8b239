// A cache at work, one cell an expert. One module without imports or network: any notebook can show it.
const STATES = ["in the slow tier", "resident", "hit", "miss", "prefetched", "evicted"];
const [AWAY, RESIDENT, HIT, MISS, PREFETCHED, EVICTED] = STATES.keys();
const LETTERS = ["", "", "h", "M", "p", "x"]; // never colour alone
const COLOURS = ["--away", "--resident", "--hit", "--miss", "--prefetched", "--evicted"];
const PREFIXES = ["B", "KiB", "MiB", "GiB", "TiB"];

const bytes = (text) => Uint8Array.from(atob(text || ""), (c) => c.charCodeAt(0));

function size(n) {
  let i = 0;
  for (; n >= 1024 && i < PREFIXES.length - 1; i++) n /= 1024;
  return `${n.toFixed(i ? 1 : 0)} ${PREFIXES[i]}`;
}

// draws one expert into a square of `side` pixels: colour, and a letter or a shape that survives greyscale
function drawCell(pen, state, x, y, side, style) {
  const paint = (name) => (pen.fillStyle = style.getPropertyValue(name).trim());
  paint(COLOURS[state]);
  pen.fillRect(x, y, side, side);
  pen.strokeStyle = style.getPropertyValue("--line").trim();
  pen.lineWidth = 0.5;
  pen.strokeRect(x + 0.25, y + 0.25, side - 0.5, side - 0.5);
  if (!LETTERS[state]) return;
  paint(state === EVICTED ? "--text" : "--ink");
  if (side >= 11) pen.fillText(LETTERS[state], x + side / 2, y + side / 2 + 0.5);
  else if (state === MISS) pen.fillRect(x + side / 4, y + side / 4, side / 2, side / 2);
  else if (state === PREFETCHED) pen.fillRect(x, y + side / 2, side, side / 2);
  else if (state === EVICTED) pen.fillRect(x + side / 4, y + side / 2 - 0.5, side / 2, 1);
}

function canvas(width, height) {
  const made = document.createElement("canvas");
  const scale = window.devicePixelRatio || 1;
  made.width = Math.round(width * scale);
  made.height = Math.round(height * scale);
  made.style.width = `${width}px`;
  made.style.height = `${height}px`;
  const pen = made.getContext("2d");
  pen.scale(scale, scale);
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  return [made, pen];
}

const FRAME = `
  <div class="bar" role="group" aria-label="replay" hidden>
    <button type="button" class="play">Play</button>
    <button type="button" class="back" aria-label="one token back">Back</button>
    <button type="button" class="step" aria-label="one token on">Step</button>
    <input class="scrub" type="range" min="0" max="0" value="0" aria-label="token">
    <select class="speed" aria-label="tokens a second"><option>2</option><option selected>8</option><option>30</option></select>
    <span>tokens/s</span>
  </div>
  <div class="main">
    <div class="grid"></div>
    <div class="side">
      <div class="stats" aria-live="off"></div>
      <svg viewBox="0 0 200 56" width="200" height="56" aria-hidden="true"><line x1="0" x2="200" y1="55" y2="55"/><line x1="0" x2="200" y1="1" y2="1"/><polyline points=""/></svg>
      <div class="axis">hit rate so far, from 0 to 1, over tokens</div>
      <div class="words"></div>
    </div>
  </div>
  <div class="legend"></div>`;

function render({ model, el }) {
  const L = model.get("layers").length, E = model.get("experts"), N = L * E;
  const root = document.createElement("div");
  root.className = "mixoff-cache";
  root.innerHTML = FRAME;
  el.replaceChildren(root);
  const $ = (name) => root.querySelector(name);
  keepKeys(root);
  const turned = L > E; // the longer axis runs from left to right
  const columns = turned ? L : E, rows = turned ? E : L;
  const side = Math.max(5, Math.min(22, Math.floor(600 / columns)));
  const left = 56, top = 16;
  const [board, pen] = canvas(left + columns * side + 1, top + rows * side + 2);
  board.setAttribute("role", "img");
  $(".grid").append(board);

  let shown = new Uint8Array(N).fill(255);
  let frames = null, stats = [], words = [], first = 0, at = 0, timer = null, style = null, newest = null;

  function dress() {
    root.classList.toggle("mixoff-dark", isDark(el));
    style = getComputedStyle(root);
    pen.clearRect(0, 0, board.width, board.height);
    pen.fillStyle = style.getPropertyValue("--text").trim() || "#111";
    pen.font = "11px system-ui, sans-serif";
    pen.textAlign = "left";
    pen.fillText(turned ? "layer →" : "expert →", left, 8);
    pen.textAlign = "right";
    const labels = turned ? [0, E - 1] : [0, L - 1];
    for (const row of labels) pen.fillText(turned ? `expert ${row}` : `layer ${model.get("layers")[row]}`, left - 4, top + (row + 0.5) * side);
    pen.textAlign = "center";
    pen.font = `${Math.max(8, side - 5)}px system-ui, sans-serif`;
    shown.fill(255);
    $(".legend").replaceChildren(...STATES.map((name, state) => {
      const item = document.createElement("span"), [swatch, ink] = canvas(14, 14);
      ink.font = "10px system-ui, sans-serif";
      drawCell(ink, state, 0, 0, 14, style);
      item.append(swatch, LETTERS[state] ? `${name} (${LETTERS[state]})` : name);
      return item;
    }));
  }

  function paint(cells) {
    if (cells.length !== N) return;
    for (let i = 0; i < N; i++) {
      if (cells[i] === shown[i]) continue;
      const layer = Math.floor(i / E), expert = i % E;
      drawCell(pen, cells[i], left + (turned ? layer : expert) * side, top + (turned ? expert : layer) * side, side, style);
      shown[i] = cells[i];
    }
    root.dataset.paints = Number(root.dataset.paints || 0) + 1;
  }

  function tell(token, [hits, misses, moved, residents]) {
    const rate = hits + misses ? (hits / (hits + misses)).toFixed(3) : "-";
    const text = `token ${token}: hit rate ${rate}, ${hits} hits, ${misses} misses, ${residents} of ${N} experts resident` + (moved ? `, ${size(moved)} moved` : "");
    $(".stats").textContent = text;
    board.setAttribute("aria-label", `Grid of ${L} layers by ${E} experts. ${text}`);
    Object.assign(root.dataset, { token, hits, misses, resident: residents, bytes: moved });
  }

  function line(rates) {
    const step = 200 / Math.max(1, rates.length - 1);
    $("polyline").setAttribute("points", rates.map((rate, i) => `${(i * step).toFixed(1)},${(55 - 54 * rate).toFixed(1)}`).join(" "));
  }

  function speak(before, now) {
    const mark = document.createElement("b");
    mark.textContent = now;
    $(".words").replaceChildren(before, ...(now ? [mark] : []));
    $(".words").scrollTop = 1e6;
  }

  function onLive() {
    newest = model.get("live");
    if (!newest || newest.cells === undefined || frames) return;
    paint(bytes(newest.cells));
    tell(newest.token, newest.stats);
    line(newest.rates);
    speak(newest.words.slice(0, -1).join(""), newest.words.at(-1) || "");
    root.dataset.mode = "live";
  }

  function onRecording() {
    const recording = model.get("recording");
    if (!recording || !recording.cells) return;
    frames = bytes(recording.cells);
    stats = recording.stats;
    first = recording.first || 0; // of a long run the beginning is gone
    words = recording.words;
    root.dataset.tokens = stats.length;
    root.dataset.mode = "replay";
    $(".scrub").max = stats.length - 1;
    $(".bar").hidden = false;
    show(newest && newest.cells !== undefined ? stats.length - 1 : 0);
  }

  function show(token) {
    at = Math.max(0, Math.min(stats.length - 1, token));
    $(".scrub").value = at;
    $(".back").disabled = at === 0;
    $(".step").disabled = at === stats.length - 1;
    paint(frames.subarray(at * N, (at + 1) * N));
    tell(first + at, stats[at]);
    $(".scrub").setAttribute("aria-valuetext", `token ${first + at}${words[at] ? `, ${words[at].trim()}` : ""}`);
    line(stats.slice(Math.max(0, at - 199), at + 1).filter(([h, m]) => h + m).map(([h, m]) => h / (h + m)));
    speak(words.slice(Math.max(0, at - 29), at).join(""), words[at] || "");
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    $(".play").textContent = "Play";
  }

  function play() {
    if (timer) return stop();
    if (at === stats.length - 1) show(0);
    $(".play").textContent = "Pause";
    timer = setInterval(() => {
      show(at + 1);
      if (at === stats.length - 1) stop();
    }, 1000 / Number($(".speed").value));
  }

  $(".play").onclick = play;
  $(".back").onclick = () => { stop(); show(at - 1); };
  $(".step").onclick = () => { stop(); show(at + 1); };
  $(".scrub").oninput = () => { stop(); show(Number($(".scrub").value)); };
  $(".speed").onchange = () => { if (timer) { stop(); play(); } };
  const redress = () => { dress(); if (frames) show(at); else onLive(); };
  const forgetThemes = onTheme(redress);
  model.on("change:live", onLive);
  model.on("change:recording", onRecording);
  dress();
  onLive();
  onRecording();
  requestAnimationFrame(redress); // now that it stands in the page, whose theme it takes
  return () => {
    stop();
    forgetThemes();
    model.off("change:live", onLive);
    model.off("change:recording", onRecording);
  };
}

export default { render };
