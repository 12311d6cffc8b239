// A map of RAM by VRAM. The sums are those of classroom/engines.py; change both together.
const DIALS = {
  ram_Bps: ["the CPU reaches", 5, 100, 1], link_Bps: ["the link carries", 2, 60, 1],
  disk_Bps: ["the disk reads", 0.2, 7, 0.1], vram_Bps: ["the card reads", 100, 2000, 20],
};
const LARGE = 1e9;

function hits(of, share) {
  const rates = of.hit_rates, at = share * (rates.length - 1), low = Math.min(Math.floor(at), rates.length - 2);
  return rates[low] + (at - low) * (rates[low + 1] - rates[low]);
}

function seconds(of, on) {
  const share = Math.min(Math.max((on.vram - of.backbone) / of.experts, 0), 1);
  const behind = Math.min(on.ram / of.experts, 1 - share), holds = on.vram >= of.backbone;
  const near = hits(of, share), all = hits(of, share + behind), inRam = Math.min((on.ram - of.backbone) / of.experts, 1);
  const whole = of.token_backbone + of.token_experts;
  return {
    card: share === 1 ? whole / on.vram_Bps : Infinity,
    split: behind < 1 - share || !holds ? Infinity
      : (of.token_backbone + share * of.token_experts) / on.vram_Bps + (1 - share) * of.token_experts / on.ram_Bps,
    copied: !holds || share === 0 ? Infinity
      : whole / on.vram_Bps + of.token_experts * ((all - near) / on.link_Bps + (1 - all) / on.disk_Bps),
    ram: inRam <= 0 ? Infinity : whole / on.ram_Bps + of.token_experts * (1 - hits(of, inRam)) / on.disk_Bps,
  };
}

function best(found) {
  let way = "none", least = Infinity;
  for (const [name, s] of Object.entries(found)) if (s < least) [way, least] = [name, s];
  return way;
}

function render({ model, el }) {
  const models = model.get("models"), { vram: VRAM, ram: RAM } = model.get("axes"), ways = model.get("ways");
  const on = { ...model.get("machine") };
  const root = document.createElement("div");
  root.className = "mixoff-engines";
  root.innerHTML = `<div class="dials"><label>model <select></select></label></div>
    <table tabindex="0" role="application"></table><div>VRAM upwards, RAM to the right, in GB.</div>
    <div class="legend"></div><div class="said" aria-live="polite"></div>`;
  el.replaceChildren(root);
  const $ = (name) => root.querySelector(name), choice = $("select"), table = $("table");
  for (const name of Object.keys(models)) choice.add(new Option(name, name));
  const nearest = (list, value) => list.reduce((a, b) => (Math.abs(b - value) < Math.abs(a - value) ? b : a));
  let at = { vram: nearest(VRAM, on.vram / LARGE), ram: nearest(RAM, on.ram / LARGE) };

  for (const [name, [words, low, high, step]] of Object.entries(DIALS)) {
    const label = document.createElement("label"), input = document.createElement("input"), out = document.createElement("b");
    Object.assign(input, { type: "range", min: low, max: high, step, value: on[name] / LARGE, name });
    const tell = () => { out.textContent = `${Number(input.value)} GB/s`; };
    input.oninput = () => { on[name] = input.value * LARGE; tell(); draw(); };
    tell();
    label.append(words, " ", input, " ", out);
    $(".dials").append(label);
  }
  for (const [letter, words, colour] of Object.values(ways)) {
    const entry = document.createElement("span"), key = document.createElement("i");
    key.textContent = letter;
    key.style.background = colour;
    entry.append(key, ` ${words}`);
    $(".legend").append(entry);
  }

  // cells are made once; a change of a dial only paints them
  const cells = [];
  for (const vram of [...VRAM].reverse()) {
    const row = table.insertRow(), head = document.createElement("th");
    head.textContent = vram;
    row.append(head);
    for (const ram of RAM) {
      const cell = row.insertCell();
      cell.onclick = () => { at = { vram, ram }; draw(); };
      cells.push([cell, vram, ram]);
    }
  }
  const foot = table.insertRow();
  for (const text of ["GB", ...RAM]) {
    const head = document.createElement("th");
    head.textContent = text;
    foot.append(head);
  }
  table.setAttribute("aria-label", "best way for each VRAM, upwards, and RAM, to the right; arrows move the mark");

  function draw() {
    const of = models[choice.value], counts = {};
    for (const [cell, vram, ram] of cells) {
      const way = best(seconds(of, { ...on, vram: vram * LARGE, ram: ram * LARGE }));
      counts[way] = (counts[way] || 0) + 1;
      cell.textContent = ways[way][0];
      cell.style.background = ways[way][2];
      cell.className = vram === at.vram && ram === at.ram ? "here" : "";
    }
    const found = seconds(of, { ...on, vram: at.vram * LARGE, ram: at.ram * LARGE }), way = best(found);
    const speed = (s) => (s === Infinity ? "does not run" : `${(1 / s).toFixed(1)} tokens/s`);
    $(".said").textContent = `${at.vram} GB of VRAM and ${at.ram} GB of RAM: ` +
      Object.entries(found).map(([name, s]) => `${ways[name][1]}: ${speed(s)}`).join("; ") + " (modelled, at most).";
    keepKeys(root);
    table.dataset.lmSuppressShortcuts = "true";
    Object.assign(root.dataset, { way, counts: JSON.stringify(counts), found: JSON.stringify(found), ...at });
  }

  table.onkeydown = (event) => {
    const move = { ArrowUp: ["vram", 1], ArrowDown: ["vram", -1], ArrowRight: ["ram", 1], ArrowLeft: ["ram", -1] }[event.key];
    if (!move) return;
    const list = move[0] === "vram" ? VRAM : RAM, next = list.indexOf(at[move[0]]) + move[1];
    if (list[next] !== undefined) { at = { ...at, [move[0]]: list[next] }; draw(); }
    event.preventDefault();
    event.stopPropagation();
  };
  choice.onchange = draw;
  const dress = () => root.classList.toggle("mixoff-dark", isDark(el));
  draw();
  requestAnimationFrame(dress);
  return onTheme(dress);
}

export default { render };
