// Four panes type the same words, each at its own modelled speed. All times come from Python; this is a clock.
const STILL_MS = 500; // between two looks at the clock, where the reader wants less motion
const FRAME = `
  <div class="bar" role="group" aria-label="race">
    <button type="button" class="play">Start the race</button>
    <button type="button" class="again">Start over</button>
    <input class="scrub" type="range" min="0" value="0" step="50" aria-label="time">
    <output class="clock"></output>
    <label>speed <select class="speed"><option value="0.5">half</option><option value="1" selected>as modelled</option><option value="2">twice</option><option value="4">four times</option></select></label>
  </div>
  <div class="about"></div>
  <div class="panes"></div>
  <div class="result" aria-live="polite"></div>
  <div class="key">Each bar is a token, as high as it took: <u data-mark="hit" style="background: var(--hit)"></u>computing <u data-mark="miss" style="background: var(--miss)"></u>waiting for copies. Underlined words missed.</div>`;

function render({ model, el }) {
  const words = model.get("words"), lead = model.get("lead"), asked = model.get("asked");
  const { root, $, forget } = plant(el, "race", FRAME, () => lanes.forEach(bars));
  let now = 0, since = 0, timer = 0, playing = false;

  const lanes = model.get("panes").map((lane) => {
    let end = 0;
    const seconds = lane.waiting_s.map((s, t) => s + lane.computing_s[t]), ends = seconds.map((s) => (end += 1000 * s)), speed = (1000 * words.length) / end;
    const typed = make("div", { className: "typed", tabIndex: 0, role: "group", "aria-label": `text of ${lane.name}` });
    const chart = make("canvas", { "aria-hidden": "true" }), score = make("div", { className: "score" });
    const head = make("h4", {}, make("span", { textContent: lane.name }), make("span", {}, `${speed.toFixed(1)} tokens/s `, make("small", { textContent: "modelled" })));
    const pane = make("div", { className: "pane", role: "group", "aria-label": lane.name }, head, make("div", { className: "note", textContent: lane.note }), typed, chart, score);
    $(".panes").append(pane);
    return { ...lane, seconds, ends, end, speed, typed, chart, score, pane, shown: -1 };
  });
  const slowest = 1000 * Math.max(...lanes.flatMap((lane) => lane.seconds));
  const last = Math.ceil(Math.max(...lanes.map((lane) => lane.end)) / 50) * 50;
  $(".scrub").max = last;
  $(".about").textContent = model.get("about");
  keepKeys(root);

  function bars(lane) {
    const { chart } = lane, width = chart.clientWidth || 300, height = 26, scale = window.devicePixelRatio || 1;
    const paint = (name) => getComputedStyle(root).getPropertyValue(name).trim(), pen = chart.getContext("2d");
    Object.assign(chart, { width: width * scale, height: height * scale });
    pen.scale(scale, scale);
    const step = width / words.length, wide = Math.max(1, step - 1), high = (ms) => Math.max(1, (height * ms) / slowest);
    lane.seconds.slice(0, lane.shown).forEach((s, t) => {
      pen.fillStyle = paint("--miss");
      pen.fillRect(t * step, height - high(1000 * s), wide, high(1000 * s));
      pen.fillStyle = paint("--hit");
      pen.fillRect(t * step, height - high(1000 * lane.computing_s[t]), wide, high(1000 * lane.computing_s[t]));
    });
  }

  function type(lane) {
    const count = lane.ends.findIndex((end) => end > now), shown = count < 0 ? words.length : count, done = shown === words.length;
    if (shown === lane.shown) return;
    if (shown < lane.shown || lane.shown < 0) {
      lane.typed.replaceChildren(make("i", { textContent: lead }), make("b"));
      lane.shown = 0;
    }
    for (let t = lane.shown; t < shown; t++) {
      const word = make("span", { textContent: words[t], title: `${lane.misses[t]} of ${asked} requests missed` });
      word.style.setProperty("--heat", (lane.misses[t] / asked).toFixed(3));
      lane.typed.lastChild.before(word);
    }
    lane.typed.lastChild.hidden = done;
    lane.typed.scrollTop = 1e6;
    lane.shown = shown;
    lane.pane.classList.toggle("done", done);
    const missed = lane.misses.slice(0, shown).reduce((sum, n) => sum + n, 0), rate = shown ? `, hit rate ${(1 - missed / (asked * shown)).toFixed(2)}` : "";
    lane.score.textContent = done ? `finished after ${(lane.end / 1000).toFixed(1)} s${rate}` : `${shown} of ${words.length} tokens${rate}`;
    lane.pane.dataset.typed = shown;
    bars(lane);
  }

  function show(ms) {
    now = Math.max(0, Math.min(last, ms));
    lanes.forEach(type);
    $(".scrub").value = now;
    $(".clock").textContent = `${(now / 1000).toFixed(1)} s`;
    $(".scrub").setAttribute("aria-valuetext", `${(now / 1000).toFixed(1)} seconds`);
    root.dataset.clock = Math.round(now);
    const order = [...lanes].sort((a, b) => a.end - b.end), ratio = order.at(-1).end / order[0].end;
    $(".result").textContent = now < last ? "" : `${order.map((lane) => `${lane.name} ${(lane.end / 1000).toFixed(1)} s`).join(", ")} (modelled). The last takes ${ratio.toFixed(1)} times as long as the first.`;
  }

  function tick() {
    if (!playing) return;
    const time = performance.now();
    show(now + (time - since) * Number($(".speed").value));
    since = time;
    if (now >= last) return pause();
    timer = isStill() ? setTimeout(tick, STILL_MS) : requestAnimationFrame(tick);
  }

  function pause() {
    playing = false;
    clearTimeout(timer);
    cancelAnimationFrame(timer);
    $(".play").textContent = now > 0 && now < last ? "Go on" : "Start the race";
    root.dataset.playing = false;
  }

  function play() {
    if (playing) return pause();
    if (now >= last) show(0);
    playing = true;
    since = performance.now();
    $(".play").textContent = "Pause";
    root.dataset.playing = true;
    tick();
  }

  $(".play").onclick = play;
  $(".again").onclick = () => { pause(); show(0); pause(); };
  $(".scrub").oninput = () => { pause(); show(Number($(".scrub").value)); pause(); };
  const watcher = new ResizeObserver(() => lanes.forEach(bars));
  watcher.observe(root);
  show(0);
  return () => {
    pause();
    forget();
    watcher.disconnect();
  };
}

export default { render };
