// A group of weights and its ruler: marks from the smallest weight to the largest. Drag the outlier, and all marks move.
const HEIGHT = 150, EDGE = 26, FARTHEST = 4; // px, px, and how many times as far as it is the outlier may go
const FRAME = `
  <div class="bar">
    <label>outlier <input class="value" type="range" aria-label="value of the outlier"><output></output></label>
    <label>bits <select class="bits"><option>2</option><option>3</option><option>4</option></select></label>
    <button type="button" class="reset">As it is in the model</button>
  </div>
  <svg role="img"></svg>
  <div class="told" aria-live="polite"></div>
  <div class="codes"></div>
  <div class="key">Dots are weights, the largest can be dragged; bars are the marks of the ruler. A line leads from each weight to its mark.</div>`;

function render({ model, el }) {
  const first = model.get("weights"), at = model.get("at"), own = first[at], far = FARTHEST * Math.abs(own);
  const { root, $, forget } = plant(el, "outlier", FRAME);
  let value = own;
  Object.assign($(".value"), { min: -far, max: far, step: far / 200 });
  $(".bits").value = model.get("bits");
  const relative = (pairs) => Math.sqrt(pairs.reduce((sum, [w, r]) => sum + (w - r) ** 2, 0) / pairs.reduce((sum, [w]) => sum + w * w, 0));

  function ruler() {
    const weights = first.map((w, i) => (i === at ? value : w)), bits = Number($(".bits").value);
    const low = Math.min(...weights), step = (Math.max(...weights) - low) / (2 ** bits - 1) || 1;
    const codes = weights.map((w) => Math.floor((w - low) / step + 0.5)), restored = codes.map((code) => low + step * code);
    const error = relative(weights.map((w, i) => [w, restored[i]]).filter((_, i) => i !== at));
    return { weights, bits, low, step, codes, restored, error };
  }

  function draw() {
    const now = ruler(), width = Math.max(260, root.clientWidth - 16), x = (w) => EDGE + ((w + far) / (2 * far)) * (width - 2 * EDGE), y = 112;
    const board = $("svg"), high = (i) => y - 34 - (i === at ? 0 : 14 * (i % 4)); // neighbours at several heights
    board.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    board.setAttribute("height", HEIGHT);
    board.setAttribute("aria-label", `${now.weights.length} weights and ${2 ** now.bits} marks, ${now.step.toFixed(3)} apart`);
    const marks = Array.from({ length: 2 ** now.bits }, (_, i) => x(now.low + i * now.step));
    board.replaceChildren(
      svg("line", { class: "line", x1: 0, x2: width, y1: y, y2: y, "data-mark": "line" }),
      ...marks.map((at) => svg("line", { class: "tick", x1: at, x2: at, y1: y - 14, y2: y + 14, "data-mark": "tick" })),
      ...marks.map((at, i) => svg("text", { x: at, y: y + 32 }, now.bits < 4 ? i : "")),
      ...now.weights.map((w, i) => svg("path", { class: "way", "data-mark": "way", d: `M ${x(w)} ${high(i)} L ${x(now.restored[i])} ${y - 14}` })),
      ...now.weights.map((w, i) => svg("circle", { class: i === at ? "outlier" : "weight", cx: x(w), cy: high(i), r: i === at ? 9 : 5, "data-mark": i === at ? "outlier" : "weight" })),
      svg("text", { x: x(value), y: y - 50 }, "drag"),
    );
    $(".value").value = value;
    $(".value").nextElementSibling.textContent = value.toFixed(2);
    $(".told").textContent = `Scale ${now.step.toFixed(3)}; relative error of the other ${now.weights.length - 1} weights: ${now.error.toFixed(2)}.`;
    const used = new Set(now.codes.filter((_, i) => i !== at)).size;
    $(".codes").textContent = `codes ${now.codes.join(" ")}: the others use ${used} of ${2 ** now.bits}`;
    Object.assign(root.dataset, { value, bits: now.bits, scale: now.step, error: now.error, codes: now.codes.join() });
    return (clientX) => { // the weight at a place on the screen
      const box = board.getBoundingClientRect();
      return ((clientX - box.left) * (width / box.width) - EDGE) / (width - 2 * EDGE) * 2 * far - far;
    };
  }

  function move(to) {
    value = Math.max(-far, Math.min(far, to));
    draw();
  }

  let weightAt = draw(), dragging = false;
  $("svg").onpointerdown = (event) => {
    dragging = true;
    $("svg").setPointerCapture(event.pointerId);
    move(weightAt(event.clientX));
  };
  $("svg").onpointermove = (event) => { if (dragging) move(weightAt(event.clientX)); };
  $("svg").onpointerup = $("svg").onpointercancel = () => { dragging = false; };
  $(".value").oninput = () => move(Number($(".value").value));
  $(".bits").onchange = draw;
  $(".reset").onclick = () => move(own);
  const watcher = new ResizeObserver(() => { weightAt = draw(); });
  watcher.observe(root);
  return () => {
    watcher.disconnect();
    forget();
  };
}

export default { render };
