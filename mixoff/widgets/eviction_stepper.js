// One layer's cache, request by request. Python worked out every step and its reason; this shows them and asks first.
const LEFT = 62, ROW = 22, TALL = 66, WIDEST = 46, NARROWEST = 25; // px: names, a row of marks, arcs, a request at most and at least
const ARCS = { belady: "the next use", lru: "the last use", fifo: "the arrival" };
const FRAME = `
  <div class="bar">
    <label>You play <select class="policy"></select></label>
    <label>against <select class="rival"></select></label>
    <button type="button" class="back" aria-label="one request back">Back</button>
    <button type="button" class="step" aria-label="one request on">Step</button>
    <button type="button" class="hint" aria-pressed="false" hidden>Show arcs</button>
    <button type="button" class="again">Start over</button>
  </div>
  <div class="queue"></div>
  <div class="axis"></div>
  <div class="lanes">
    <div class="lane mine"><span></span><div class="slots" role="group" aria-label="slots"></div></div>
    <div class="lane other"><span></span><div class="slots" role="group" aria-label="slots of the other policy"></div></div>
  </div>
  <div class="said" aria-live="polite"></div>
  <div class="score"></div>`;

function render({ model, el }) {
  const requests = model.get("requests"), all = model.get("steps"), names = model.get("names"), T = requests.length;
  const { root, $, forget } = plant(el, "stepper", FRAME, () => draw());
  let at = -1, asking = false, hinted = false;
  let first = new Map(); // the first answer to each question, right or wrong: later ones do not count

  const policy = () => $(".policy").value, rival = () => $(".rival").value;
  const steps = () => all[policy()];
  $(".policy").replaceChildren(...Object.keys(all).map((name) => new Option(names[name], name)));
  $(".rival").replaceChildren(new Option("nobody", ""), ...Object.keys(all).map((name) => new Option(names[name], name)));
  $(".rival").value = Object.keys(all)[1] || "";

  function counts(name) { // hits and misses so far
    const done = all[name].slice(0, at + 1), hits = done.filter((step) => step.hit).length;
    return [hits, done.length - hits];
  }

  // ---- requests, marks and arcs

  function picture() {
    const room = Math.max(240, root.clientWidth - 16) - LEFT - 8, step = Math.max(NARROWEST, Math.min(WIDEST, room / T));
    const lanes = [policy(), rival()].filter(Boolean), height = TALL + ROW + 6 + ROW * lanes.length;
    const x = (t) => LEFT + (t + 0.5) * step, drawn = svg("svg", { width: LEFT + T * step + 4, height, role: "img", "aria-label": words() });
    requests.forEach((expert, t) => drawn.append(svg("text", { x: x(t), y: TALL + ROW / 2, class: t > at + 1 ? "late" : "" }, expert)));
    if (at + 1 < T) drawn.append(svg("rect", { x: x(at + 1) - step / 2 + 2, y: TALL, width: step - 4, height: ROW, rx: 3, class: "now" }));
    lanes.forEach((name, row) => {
      const y = TALL + ROW + 6 + row * ROW;
      drawn.append(svg("text", { x: LEFT - 8, y: y + ROW / 2, class: "name" }, names[name]));
      all[name].slice(0, at + 1).forEach(({ hit }, t) => drawn.append(
        svg("rect", { x: x(t) - step / 2 + 2, y: y + 1, width: step - 4, height: ROW - 3, class: hit ? "hit" : "miss", "data-mark": hit ? "hit" : "miss" }),
        svg("text", { x: x(t), y: y + ROW / 2, class: hit ? "on-hit" : "on-miss" }, hit ? "h" : "M"),
      ));
    });
    drawn.append(...arcs(x, step));
    return drawn;
  }

  function arcs(x, step) { // from the request at hand to those by which the policy judges its residents
    const t = asking ? at + 1 : at, shown = t >= 0 && (!asking || hinted) ? steps()[t] : { arcs: [] };
    root.dataset.arcs = shown.arcs.length;
    $(".axis").textContent = shown.arcs.length ? `Arcs lead from this request to ${ARCS[policy()]} of each resident.` : "";
    return shown.arcs.flatMap(([expert, to]) => {
      const end = to === null ? x(T - 1) + step / 2 : x(to), far = Math.abs(end - x(t)), top = TALL - 4 - Math.min(TALL - 18, 14 + far / 5);
      const gone = !asking && expert === shown.evicted, kind = `${gone ? "gone" : "kept"}${to === null ? " never" : ""}`;
      return [
        svg("path", { d: `M ${x(t)} ${TALL - 2} Q ${(x(t) + end) / 2} ${2 * top - TALL + 8} ${end} ${to === null ? top - 6 : TALL - 2}`, class: kind, "data-mark": gone ? "gone" : "kept" }),
        svg("text", { x: to === null ? end - 22 : (x(t) + end) / 2, y: to === null ? top - 14 : top - 6 }, to === null ? `${expert} never` : expert),
      ];
    });
  }

  function words() {
    const next = at + 1 < T ? `next request: expert ${requests[at + 1]}` : "no more requests";
    return `${next}; so far ${[policy(), rival()].filter(Boolean).map((name) => `${names[name]} ${counts(name).join(" hits and ")} misses`).join(", ")}`;
  }

  // ---- slots

  function slots(name, box, ask) {
    const before = at < 0 ? all[name][0].slots.map(() => null) : all[name][at].slots, last = at < 0 ? null : all[name][at];
    box.querySelector(".slots").replaceChildren(...before.map((expert, i) => {
      const slot = make(ask === undefined ? "div" : "button", { textContent: expert === null ? "empty" : expert });
      if (ask) slot.className = "ask";
      else if (last && expert === last.expert) {
        slot.className = last.hit ? "hit" : "miss";
        slot.textContent = `${expert} ${last.hit ? "h" : "M"}`;
      }
      const state = slot.className === "hit" ? ", hit" : slot.className === "miss" ? ", miss" : "";
      slot.setAttribute("aria-label", ask ? `evict expert ${expert}` : `slot ${i + 1}: ${expert === null ? "empty" : `expert ${expert}`}${state}`);
      if (ask === undefined) return slot;
      Object.assign(slot, { type: "button", disabled: !ask, onclick: () => answer(expert) });
      return slot;
    }));
    const [hits, misses] = counts(name);
    box.querySelector("span").textContent = `${names[name]}: ${hits} ${hits === 1 ? "hit" : "hits"}, ${misses} ${misses === 1 ? "miss" : "misses"}`;
  }

  function draw() {
    $(".queue").replaceChildren(picture());
    slots(policy(), $(".mine"), asking);
    $(".other").hidden = !rival();
    if (rival()) slots(rival(), $(".other"));
    keepKeys(root);
    $(".back").disabled = at < 0;
    $(".step").disabled = asking || at === T - 1;
    $(".hint").hidden = !asking || !steps()[at + 1].arcs.length;
    $(".hint").setAttribute("aria-pressed", hinted);
    const right = [...first.values()].filter(Boolean).length;
    $(".score").textContent = first.size ? `${right} of ${first.size} guesses right` : "";
    const [hits, misses] = counts(policy());
    Object.assign(root.dataset, { at: at + 1, hits, misses, policy: policy(), asking, rivalHits: rival() ? counts(rival())[0] : "" });
  }

  // ---- steps and guesses

  function describe() {
    if (at < 0) return `Step to make the first of ${T} requests.`;
    const step = steps()[at];
    if (step.hit) return `Expert ${step.expert} is resident: a hit.`;
    if (step.evicted === null) return `Expert ${step.expert} takes an empty slot: a miss.`;
    return `${step.why} Expert ${step.expert} takes its slot: a miss.`;
  }

  function end() {
    if (at < T - 1 || !rival()) return "";
    const [[mine], [other]] = [counts(policy()), counts(rival())];
    return ` The end: ${names[policy()]} ${mine} hits, ${names[rival()]} ${other}.`;
  }

  function say(text) {
    $(".said").textContent = text;
  }

  function next() {
    const coming = steps()[at + 1];
    if (!coming) return;
    if (coming.evicted !== null && !asking) {
      asking = true;
      hinted = false;
      say(`Expert ${coming.expert} is not here and no slot is free. Which one does ${names[policy()]} evict? Choose a slot.`);
      return draw();
    }
    asking = false;
    at += 1;
    say(describe() + end());
    draw();
  }

  function answer(expert) {
    const key = at + 1, correct = expert === steps()[key].evicted, counted = first.has(key);
    if (!counted) first.set(key, correct);
    next();
    const verdict = correct ? "Right." : `No: ${names[policy()]} keeps ${expert}.`;
    say(`${verdict} ${describe()}${end()}${counted ? " Your first answer counts." : ""}`);
    $(".step").focus();
  }

  function start() {
    at = -1;
    asking = hinted = false;
    first = new Map();
    say(describe());
    draw();
  }

  $(".step").onclick = next;
  $(".back").onclick = () => {
    if (asking) asking = false;
    else at -= 1;
    say(describe());
    draw();
  };
  $(".hint").onclick = () => { hinted = !hinted; draw(); };
  $(".again").onclick = start;
  $(".policy").onchange = () => {
    if (rival() === policy()) $(".rival").value = Object.keys(all).find((name) => name !== policy()) || "";
    start();
  };
  $(".rival").onchange = draw;
  const watcher = new ResizeObserver(() => $(".queue").replaceChildren(picture()));
  start();
  watcher.observe(root);
  return () => {
    watcher.disconnect();
    forget();
  };
}

export default { render };
