// A cache at work: one cell per expert, tiles that come over the link, and the words whose routing asked for them.
const STATES = ["in the slow tier", "resident", "hit", "miss", "prefetched", "evicted"];
const [AWAY, RESIDENT, HIT, MISS, PREFETCHED, EVICTED] = STATES.keys();
const LETTERS = ["", "", "h", "M", "p", "x"]; // never colour alone
const FILLS = ["", "--resident", "--hit", "--miss", "--prefetched", ""];
const INKS = ["", "", "--on-hit", "--on-miss", "--on-prefetched", "--text"];
const PREFIXES = ["B", "KiB", "MiB", "GiB", "TiB"];
const LEFT = 50, SHELF = 22, LINK = 44, HEAD = 18; // px: labels of rows, slow tier, link, label of columns
const LARGEST = 34, LETTERED = 11, TALLEST = 800; // px: a cell at most, a cell with a letter at least, the grid at most
const PX_PER_GBps = 4, MOST_TILES = 48, FLIGHT_MS = 420;
const WINDOW = 240; // words and bars that are shown at once

const bytes = (text) => Uint8Array.from(atob(text || ""), (c) => c.charCodeAt(0));
const between = (low, x, high) => Math.max(low, Math.min(high, x));
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : word.endsWith("s") ? "es" : "s"}`;

function size(n) {
  let i = 0;
  for (; n >= 1024 && i < PREFIXES.length - 1; i++) n /= 1024;
  return `${n.toFixed(i ? 1 : 0)} ${PREFIXES[i]}`;
}

// sets a canvas to a size in CSS pixels, sharp on any screen
function sized(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  Object.assign(canvas, { width: Math.round(width * scale), height: Math.round(height * scale) });
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  Object.assign(pen, { textAlign: "center", textBaseline: "middle" });
  return pen;
}

// draws one expert into a square of `side` pixels; small cells get no letter and no border, and asked experts stand out
function drawCell(pen, state, x, y, side, paint) {
  const small = side < LETTERED, inset = small && state === RESIDENT && side > 3 ? 0.5 : 0;
  pen.fillStyle = paint("--paper");
  pen.fillRect(x, y, side, side);
  if (FILLS[state]) {
    pen.fillStyle = paint(FILLS[state]);
    pen.fillRect(x + inset, y + inset, side - 2 * inset, side - 2 * inset);
  }
  pen.strokeStyle = paint("--line");
  pen.lineWidth = 1;
  if (!small) pen.strokeRect(x + 0.5, y + 0.5, side, side);
  if (!LETTERS[state]) return;
  pen.fillStyle = paint(INKS[state]);
  pen.font = `${Math.min(16, Math.max(8, side - 6))}px system-ui, sans-serif`;
  if (!small) pen.fillText(LETTERS[state], x + side / 2, y + side / 2 + 0.5);
  else if (state === MISS) pen.fillRect(x + side / 3, y + side / 3, side / 3, side / 3);
  else if (state === PREFETCHED) pen.fillRect(x, y + side / 2, side, side / 2);
  else if (state === EVICTED) pen.fillRect(x + side / 4, y + side / 2 - 0.5, side / 2, 1);
}

const FRAME = `
  <div class="bar" role="group" aria-label="replay" hidden>
    <button type="button" class="play">Play</button>
    <button type="button" class="back" aria-label="one token back">Back</button>
    <button type="button" class="step" aria-label="one token on">Step</button>
    <input class="scrub" type="range" min="0" max="0" value="0" aria-label="token">
    <select class="speed" aria-label="tokens per second"><option>2</option><option selected>8</option><option>30</option></select>
    <span>tokens/s</span>
    <label class="sorting" hidden><input type="checkbox" class="sort"> most used first</label>
  </div>
  <div class="main">
    <div class="stage"><canvas class="board" role="img" tabindex="0"></canvas></div>
    <div class="side">
      <div class="stats" aria-live="off"></div>
      <canvas class="chart" role="img"></canvas>
      <div class="axis">requests of each token: misses below (M), hits above; click one to go there</div>
      <div class="words" role="group" aria-label="words, underlined by their misses"></div>
    </div>
  </div>
  <div class="told" aria-live="polite"></div>
  <canvas class="past" role="img" hidden></canvas>
  <div class="legend"></div>`;

function render({ model, el }) {
  const layers = model.get("layers"), L = layers.length, E = model.get("experts"), N = L * E;
  const { root, $, forget, dress } = plant(el, "cache", FRAME, redress);
  const board = $(".board"), base = document.createElement("canvas");
  let pen = null, basePen = null, cell = 5, turned = false, order = null; // order: place of each expert in its row
  let flight = FLIGHT_MS, drawn = 0, cells = new Uint8Array(N), frames = null, stats = [], words = [], counts = [], uses = null;
  let first = 0, at = 0, timer = null, newest = null, cursor = null, tiles = [], raf = 0;
  const colours = {};
  const paint = (name) => (colours[name] ??= getComputedStyle(root).getPropertyValue(name).trim());

  // ---- places

  function measure() { // the longer axis runs from left to right, unless that makes cells too small for a narrow page
    const room = Math.max(240, root.clientWidth - 16) - LEFT - 2;
    const side = (turn) => Math.min(LARGEST, Math.floor(room / (turn ? L : E)), Math.floor(TALLEST / (turn ? E : L)));
    turned = L > E ? side(true) >= side(false) : side(true) > 1.5 * side(false);
    cell = Math.max(2, side(turned));
  }

  const columns = () => (turned ? L : E), rows = () => (turned ? E : L);
  const top = SHELF + LINK + HEAD;

  function place(i) { // the corner of the cell of an expert
    const layer = Math.floor(i / E), rank = order ? order[i] : i % E;
    return [LEFT + (turned ? layer : rank) * cell, top + (turned ? rank : layer) * cell];
  }

  function found(x, y) { // the cell at a point of the board, or null
    const column = Math.floor((x - LEFT) / cell), row = Math.floor((y - top) / cell);
    if (column < 0 || row < 0 || column >= columns() || row >= rows()) return null;
    const layer = turned ? column : row, rank = turned ? row : column;
    return layer * E + (order ? order.subarray(layer * E, layer * E + E).indexOf(rank) : rank);
  }

  // ---- drawing

  function redress() {
    for (const name of Object.keys(colours)) delete colours[name];
    measure();
    const width = LEFT + columns() * cell + 2, height = top + rows() * cell + 2;
    pen = sized(board, width, height);
    basePen = sized(base, width, height);
    drawFrame(width, height);
    for (let i = 0; i < N; i++) drawCell(basePen, cells[i], ...place(i), cell, paint);
    blit();
    legend();
    if (frames) show(at, false);
    else onLive();
  }

  function drawFrame(width, height) { // the slow tier, the link as wide as its bandwidth, and labels
    const link = model.get("link") || {}, wide = between(3, (link.GBps || 0) * PX_PER_GBps, width - LEFT - 1), middle = (LEFT + width) / 2;
    basePen.fillStyle = paint("--paper");
    basePen.fillRect(0, 0, width, height);
    Object.assign(basePen, { strokeStyle: paint("--line"), lineWidth: 1, fillStyle: paint("--text"), font: "12px system-ui, sans-serif" });
    basePen.strokeRect(LEFT + 0.5, 0.5, width - LEFT - 1.5, SHELF - 1);
    basePen.fillText("slow tier: holds all experts", middle, SHELF / 2 + 1);
    if (link.GBps) {
      basePen.beginPath();
      for (const x of [middle - wide / 2, middle + wide / 2]) {
        basePen.moveTo(x, SHELF);
        basePen.lineTo(x, SHELF + LINK);
      }
      basePen.stroke();
      const left = middle - wide / 2 - LEFT > 92;
      basePen.textAlign = left ? "right" : "center";
      const lines = left ? [`link ${link.GBps} GB/s`, `(${link.source})`] : [`${link.GBps} GB/s (${link.source})`];
      lines.forEach((text, i) => basePen.fillText(text, left ? middle - wide / 2 - 6 : middle, SHELF + LINK / 2 + (i - (lines.length - 1) / 2) * 15));
    }
    basePen.textAlign = "left";
    basePen.fillText(turned ? "layer →" : order ? "experts, most used first →" : "expert →", LEFT, SHELF + LINK + HEAD / 2);
    basePen.textAlign = "right";
    const labels = turned ? [0, E - 1] : [...new Set([0, L - 1])];
    for (const row of labels) basePen.fillText(turned ? (order ? `${row + 1}.` : `expert ${row}`) : `layer ${layers[row]}`, LEFT - 4, top + (row + 0.5) * cell);
    basePen.textAlign = "center";
    root.dataset.linkPx = Math.round(wide);
  }

  function blit() {
    pen.save();
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.drawImage(base, 0, 0);
    pen.restore();
    const asked = cell < LETTERED && cell > 3; // small cells of requests are drawn larger than their neighbours
    if (asked) for (let i = 0; i < N; i++) if (cells[i] === HIT || cells[i] === MISS) drawCell(pen, cells[i], ...place(i).map((x) => x - 1), cell + 2, paint);
    if (cursor === null) return;
    const [x, y] = place(cursor);
    Object.assign(pen, { strokeStyle: paint("--text"), lineWidth: 2.5 });
    pen.strokeRect(x, y, cell, cell);
  }

  function draw(next, fly) {
    if (next.length !== N) return;
    land();
    flight = between(60, 0.8 * (performance.now() - drawn), FLIGHT_MS); // tiles land before the next frame
    drawn = performance.now();
    const missed = [];
    for (let i = 0; i < N; i++) {
      if (next[i] === MISS && fly && missed.length < MOST_TILES) missed.push(i);
      if (next[i] === cells[i]) continue;
      cells[i] = next[i];
      drawCell(basePen, cells[i], ...place(i), cell, paint);
    }
    root.dataset.paints = Number(root.dataset.paints || 0) + 1;
    if (missed.length && !isStill()) launch(missed);
    else blit();
  }

  function launch(missed) { // one after the other, as on a link; each cell stays empty until its tile is there
    const start = performance.now(), wait = Math.min(40, (0.6 * flight) / missed.length);
    tiles = missed.map((i, k) => ({ i, t0: start + k * wait }));
    for (const i of missed) drawCell(basePen, AWAY, ...place(i), cell, paint);
    raf = requestAnimationFrame(fly);
  }

  function fly(now) {
    const wide = Number(root.dataset.linkPx), middle = (LEFT + board.clientWidth) / 2, big = Math.max(cell, 8);
    const arrived = tiles.filter((tile) => now - tile.t0 >= flight);
    tiles = tiles.filter((tile) => now - tile.t0 < flight);
    for (const { i } of arrived) drawCell(basePen, cells[i], ...place(i), cell, paint);
    root.dataset.flown = Number(root.dataset.flown || 0) + arrived.length;
    blit();
    for (const { i, t0 } of tiles) {
      const t = between(0, (now - t0) / flight, 1), down = Math.min(1, t / 0.45), across = Math.max(0, (t - 0.45) / 0.55);
      const [x, y] = place(i), lane = middle + ((i % 5) / 4 - 0.5) * Math.max(0, wide - big) - big / 2;
      const height = SHELF - big / 2 + (LINK - big / 2) * down;
      drawCell(pen, MISS, lane + (x - lane) * across, height + (y - height) * across, big + (cell - big) * across, paint);
    }
    raf = tiles.length ? requestAnimationFrame(fly) : 0;
  }

  function land() { // puts down at once what is still in the air
    cancelAnimationFrame(raf);
    for (const { i } of tiles) drawCell(basePen, cells[i], ...place(i), cell, paint);
    root.dataset.flown = Number(root.dataset.flown || 0) + tiles.length;
    tiles = [];
  }

  function legend() {
    $(".legend").replaceChildren(...STATES.map((name, state) => {
      const swatch = document.createElement("canvas");
      drawCell(sized(swatch, 16, 16), state, 0, 0, 15, paint);
      return make("span", {}, swatch, LETTERS[state] ? `${name} (${LETTERS[state]})` : name);
    }));
  }

  // ---- words and bars

  function tell(token, [hits, misses, moved, residents], prompt) {
    const rate = hits + misses ? (hits / (hits + misses)).toFixed(3) : "-", held = `${residents} of ${N} experts resident`;
    const read = prompt && !hits && !misses;
    const text = read
      ? `token ${token}, the prompt, read at once: ${plural(prompt[0], "miss")}, ${size(prompt[1])} moved, outside the hit rate; ${held}`
      : `token ${token}: hit rate ${rate}, ${hits} hits, ${misses} misses, ${held}` + (moved ? `, ${size(moved)} moved` : "");
    $(".stats").textContent = text;
    board.setAttribute("aria-label", `Grid of ${L} layers by ${E} experts; arrow keys choose one. ${text}`);
    Object.assign(root.dataset, { token, hits, misses, resident: residents, bytes: moved });
  }

  function bars(now) { // one bar per token; all have as many requests, so that misses show as a share
    const chart = $(".chart"), width = Math.max(200, $(".side").clientWidth), height = 64, ink = sized(chart, width, height);
    const shown = Math.min(counts.length, WINDOW, Math.floor(width / 4)), from = between(0, now - (shown >> 1), counts.length - shown);
    const most = Math.max(1, ...counts.map(([h, m]) => h + m)), step = Math.min(16, width / Math.max(1, shown)), wide = Math.max(2, step - 1);
    chart.setAttribute("aria-label", `Bars of ${shown} tokens, hits and misses of each; this one: ${(counts[now] || [0, 0]).join(" and ")}`);
    for (let k = 0; k < shown; k++) {
      const [hits, misses] = counts[from + k], x = k * step, scale = (height - 8) / most;
      if (!hits && !misses) { // a prompt
        ink.strokeStyle = paint("--line");
        ink.strokeRect(x + 0.5, 4.5, wide - 1, height - 9);
      }
      ink.fillStyle = paint("--miss");
      ink.fillRect(x, height - 4 - misses * scale, wide, misses * scale);
      ink.fillStyle = paint("--hit");
      ink.fillRect(x, height - 4 - (hits + misses) * scale, wide, hits * scale - 1);
      if (from + k !== now) continue;
      ink.fillStyle = paint("--text");
      ink.fillRect(x, 0, wide, 3);
      ink.fillRect(x, height - 3, wide, 3);
    }
    chart.onclick = (event) => frames && jump(between(0, from + Math.floor(event.offsetX / step), stats.length - 1));
  }

  function speak(before, list, from, now, prompt) { // `from`: index of the first word of `list`
    const place = $(".words"), kept = place.dataset.from === String(from) && place.querySelectorAll("span").length === list.length && frames;
    const most = Math.max(1, ...counts.map(([, m]) => m));
    if (!kept) {
      const lead = before ? [make("i", { textContent: before, title: "the prompt" })] : [];
      place.replaceChildren(...lead, ...list.map((word, k) => {
        const [hits, misses] = counts[from + k] || [0, 0];
        const made = make("span", { role: "button", tabIndex: -1, textContent: word.replace("\n", "⏎\n"), title: `${plural(misses, "miss")} of ${hits + misses} requests` });
        made.style.setProperty("--heat", (misses / most).toFixed(3));
        made.onclick = () => frames && jump(from + k);
        return made;
      }));
      place.dataset.from = from;
      keepKeys(root);
    }
    const made = [...place.querySelectorAll("span")];
    made.forEach((word, k) => {
      word.className = from + k === now ? "now" : from + k > now ? "late" : "";
      word.tabIndex = from + k === now ? 0 : -1;
    });
    const mark = made[now - from];
    if (mark) place.scrollTop = Math.max(0, mark.offsetTop - place.offsetTop - place.clientHeight / 2);
  }

  // ---- one expert's history

  function history(i) {
    cursor = i;
    $(".past").hidden = i === null || !frames;
    if (i === null) $(".told").textContent = frames ? "Point at an expert, or choose one with the arrow keys, for its history." : "";
    else $(".told").textContent = frames ? past(i) : `Layer ${layers[Math.floor(i / E)]}, expert ${i % E}: ${STATES[cells[i]]}.`;
    root.dataset.cursor = i ?? "";
    if (pen) blit();
  }

  function past(i) {
    const T = stats.length, seen = Array.from({ length: T }, (_, t) => frames[t * N + i]), count = (s) => seen.filter((x) => x === s).length;
    const strip = $(".past"), width = Math.max(200, root.clientWidth - 16), step = width / T, ink = sized(strip, width, 14);
    seen.forEach((state, t) => {
      ink.fillStyle = paint(FILLS[state] || "--paper");
      ink.fillRect(t * step, state === MISS ? 0 : 4, Math.max(1, step - (step > 3)), state === MISS ? 14 : 8);
    });
    ink.fillStyle = paint("--text");
    ink.fillRect(at * step, 0, 2, 14);
    strip.setAttribute("aria-label", "history of the expert, token by token");
    const came = seen.slice(0, at + 1).lastIndexOf(MISS), here = [RESIDENT, HIT, MISS, PREFETCHED].includes(seen[at]);
    const since = here && came >= 0 ? `, here since token ${first + came}` : "";
    return `Layer ${layers[Math.floor(i / E)]}, expert ${i % E}: ${STATES[seen[at]]}${since}. Of ${T} tokens ${count(HIT) + count(MISS)} asked for it: `
      + `${plural(count(HIT), "hit")}, ${plural(count(MISS), "miss")}; evicted ${plural(count(EVICTED), "time")}.`;
  }

  function steer(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!steps) return;
    event.preventDefault();
    if (cursor === null) return history(0);
    const [x, y] = place(cursor);
    history(found(x + 1 + steps[0] * cell, y + 1 + steps[1] * cell) ?? cursor);
  }

  // ---- live, then replay

  function onLive() {
    newest = model.get("live");
    if (!newest || newest.cells === undefined || frames) return;
    if (!pen) return;
    draw(bytes(newest.cells), true);
    counts = newest.counts || [];
    tell(newest.token, newest.stats, newest.prompt);
    bars(counts.length - 1);
    speak(newest.lead, newest.words, Math.max(0, counts.length - newest.words.length), counts.length - 1);
    root.dataset.mode = "live";
  }

  function onRecording() {
    const recording = model.get("recording");
    if (!recording || !recording.cells) return;
    frames = bytes(recording.cells);
    ({ stats, words } = recording);
    first = recording.first || 0; // of a long run the beginning is gone
    counts = stats.map(([h, m], t) => (t || !first ? [h - (t ? stats[t - 1][0] : 0), m - (t ? stats[t - 1][1] : 0)] : [0, 0]));
    uses = new Uint32Array(N);
    for (let k = 0; k < frames.length; k++) uses[k % N] += frames[k] === HIT || frames[k] === MISS;
    root.dataset.tokens = stats.length;
    root.dataset.mode = "replay";
    $(".scrub").max = stats.length - 1;
    $(".bar").hidden = false;
    $(".sorting").hidden = E <= 16;
    $(".sort").checked = E > 32;
    at = newest && newest.cells !== undefined ? stats.length - 1 : 0;
    history(null);
    sort();
  }

  function sort() {
    order = null;
    if ($(".sort").checked && uses) {
      order = new Uint16Array(N);
      for (let layer = 0; layer < L; layer++) {
        const ranked = [...Array(E).keys()].sort((a, b) => uses[layer * E + b] - uses[layer * E + a] || a - b);
        ranked.forEach((expert, rank) => { order[layer * E + expert] = rank; });
      }
    }
    dress();
  }

  function show(token, moving = true) {
    const before = at;
    at = between(0, token, stats.length - 1);
    $(".scrub").value = at;
    $(".back").disabled = at === 0;
    $(".step").disabled = at === stats.length - 1;
    draw(frames.subarray(at * N, (at + 1) * N), moving && at === before + 1);
    const { prompt, lead } = model.get("recording");
    tell(first + at, stats[at], prompt);
    $(".scrub").setAttribute("aria-valuetext", `token ${first + at}${words[at] ? `, ${words[at].trim()}` : ""}`);
    bars(at);
    const from = words.length <= WINDOW ? 0 : between(0, (Math.floor(at / 120) - 1) * 120, words.length - WINDOW);
    speak(from ? "" : lead, words.some(Boolean) ? words.slice(from, from + WINDOW) : [], from, at);
    if (cursor !== null) history(cursor);
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    $(".play").textContent = "Play";
  }

  function jump(token) {
    stop();
    show(token);
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
  $(".back").onclick = () => jump(at - 1);
  $(".step").onclick = () => jump(at + 1);
  $(".scrub").oninput = () => jump(Number($(".scrub").value));
  $(".sort").onchange = sort;
  $(".speed").onchange = () => { if (timer) { stop(); play(); } };
  $(".words").onkeydown = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !frames) return;
    event.preventDefault();
    jump(at + step);
    $(".words .now")?.focus();
  };
  board.onpointermove = (event) => history(found(event.offsetX, event.offsetY));
  board.onpointerleave = board.onblur = () => history(null);
  board.onkeydown = steer;
  const watcher = new ResizeObserver(() => { if (root.clientWidth !== Number(root.dataset.width)) { root.dataset.width = root.clientWidth; dress(); } });
  watcher.observe(root);
  model.on("change:live", onLive);
  model.on("change:recording", onRecording);
  model.on("change:link", dress);
  dress();
  onRecording();
  return () => {
    stop();
    forget();
    watcher.disconnect();
    cancelAnimationFrame(raf);
    for (const [name, fn] of [["live", onLive], ["recording", onRecording], ["link", dress]]) model.off(`change:${name}`, fn);
  };
}

export default { render };
