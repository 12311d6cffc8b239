// A plan, control by control. The kernel works out every figure; this asks and draws what comes back.
const PARTS = ["backbone", "KV cache", "workspace", "experts", "kept free"];
const UNITS = { experts: " bits", attention: " bits", group: " weights", context: " tokens" };
const SLIDERS = { experts: "Bits of experts", attention: "Bits of attention", group: "Group size of experts", context: "Context", slots: "Slots of a layer" };
const PREFIXES = ["B", "KiB", "MiB", "GiB", "TiB"];
const BUSY_MS = 400, PATIENCE_MS = 8000; // a first look at a large model takes a second or two
const SLOWEST = 0.1, FASTEST = 100; // tokens/s, ends of the scale

const FRAME = `
  <div class="controls" role="group" aria-label="plan">
    <label><span>Model</span> <select data-name="model"></select><output hidden></output></label>
    <label><span>Machine</span> <select data-name="hardware"></select><output hidden></output></label>
  </div>
  <div class="verdict" aria-live="polite"></div>
  <div class="change" aria-live="polite"></div>
  <div class="tiers"></div>
  <div class="legend"></div>
  <div class="band"><div class="scale" role="img"><i></i><b></b></div><span class="speed"></span></div>`;

function size(n) { // three significant digits, as in Python
  let i = 0;
  for (; n >= 1024 && i < PREFIXES.length - 1; i++) n /= 1024;
  return `${n.toFixed(!i || n >= 100 ? 0 : n >= 10 ? 1 : 2)} ${PREFIXES[i]}`;
}

function render({ model, el }) {
  const options = model.get("options");
  const { root, $, forget } = plant(el, "explorer", FRAME);
  root.classList.toggle("still", el.inert); // on a page without a kernel: what was chosen, in words
  const control = (name) => $(`[data-name="${name}"]`);
  let asked = model.get("choice").asked, silences = [];

  for (const [name, title] of Object.entries(SLIDERS)) {
    const label = document.createElement("label"), words = document.createElement("span");
    const input = document.createElement("input"), output = document.createElement("output");
    words.textContent = title;
    Object.assign(input, { type: "range", min: 0, max: name === "slots" ? model.get("answer").experts : options[name].length - 1 });
    input.dataset.name = name;
    label.append(words, input, output);
    $(".controls").append(label);
  }
  keepKeys(root);
  for (const name of ["model", "hardware"])
    control(name).replaceChildren(...options[name].map((value) => new Option(value.split("/").at(-1), value)));

  function read() { // what the controls say
    const chosen = { model: control("model").value, hardware: control("hardware").value };
    for (const name of Object.keys(SLIDERS)) {
      const at = Number(control(name).value);
      chosen[name] = name === "slots" ? at : options[name][at];
    }
    return chosen;
  }

  function label() { // the words beside each slider, which screen readers say too
    const chosen = read(), slots = model.get("answer").slots;
    for (const name of Object.keys(SLIDERS)) {
      let words = chosen[name].toLocaleString("en") + (UNITS[name] || "");
      if (name === "slots") words = chosen.slots ? `${chosen.slots}` : `as many as fit (${slots})`;
      if (name === "group" && chosen.experts === 16) words = "none in 16 bits";
      control(name).setAttribute("aria-valuetext", words);
      control(name).parentElement.querySelector("output").textContent = words;
    }
    for (const name of ["model", "hardware"]) {
      const output = control(name).parentElement.querySelector("output");
      output.hidden = !root.classList.contains("still");
      output.textContent = chosen[name].split("/").at(-1);
    }
  }

  function ask() {
    asked += 1;
    label();
    root.dataset.asked = asked;
    root.setAttribute("aria-busy", "true");
    silences.forEach(clearTimeout);
    const later = (text, ms) => setTimeout(() => { $(".verdict").textContent = text; }, ms);
    silences = [later("Working it out …", BUSY_MS), later("Waiting for the kernel. If none is running, run this cell again.", PATIENCE_MS)];
    model.set("choice", { ...read(), asked });
    model.save_changes();
  }

  function onChoice() { // another view of the same widget, or Python, moved a control
    const choice = model.get("choice");
    asked = Math.max(asked, choice.asked);
    if (choice.asked < asked) return; // an echo from before the last move
    control("model").value = choice.model;
    control("hardware").value = choice.hardware;
    for (const name of Object.keys(SLIDERS)) control(name).value = name === "slots" ? choice.slots : options[name].indexOf(choice[name]);
    label();
  }

  function onAnswer() {
    const answer = model.get("answer");
    if (answer.asked < asked) return; // a newer question is on its way
    silences.forEach(clearTimeout);
    root.setAttribute("aria-busy", "false");
    root.dataset.answered = answer.asked;
    root.dataset.error = answer.error || "";
    if (answer.error) {
      $(".verdict").textContent = answer.error;
      clear();
      return root.classList.add("wrong");
    }
    root.classList.toggle("wrong", !answer.fits || answer.slow);
    $(".band").hidden = false;
    control("slots").max = answer.experts;
    control("context").max = answer.contexts - 1;
    if (answer.lowered) control("context").value = options.context.indexOf(answer.lowered);
    label();
    $(".verdict").textContent = answer.verdict[0].toUpperCase() + answer.verdict.slice(1) + ".";
    const lowered = answer.lowered ? `The context is ${answer.lowered.toLocaleString("en")}, the longest here that this model was made for. ` : "";
    $(".change").textContent = lowered + (answer.change ? `The smallest change that makes it fit: ${answer.change}.` : "");
    bars(answer.tiers);
    band(answer);
    const [fast, ...others] = answer.tiers, of = (name) => (others.find((tier) => tier.name === name) || { nbytes: 0 }).nbytes;
    Object.assign(root.dataset, {
      fits: answer.fits, resident: answer.resident, slots: answer.slots, fastBytes: fast.nbytes, fastLimit: fast.limit,
      ramBytes: of("RAM"), diskBytes: of("disk"), storeBytes: answer.store, change: answer.change,
      low: answer.rates.low ?? "", expected: answer.rates.expected ?? "", high: answer.rates.high ?? "",
    });
  }

  function clear() { // nothing of the former plan stays next to an error
    for (const name of [".change", ".tiers", ".legend"]) $(name).replaceChildren();
    $(".band").hidden = true;
    for (const name of ["fits", "resident", "slots", "fastBytes", "low", "expected", "high"]) delete root.dataset[name];
  }

  function bars(tiers) { // all on one scale, so that lengths compare
    const whole = Math.max(...tiers.map((tier) => Math.max(tier.nbytes, tier.limit || 0))) * 1.01;
    $(".tiers").replaceChildren(...tiers.map((tier) => {
      const row = document.createElement("div"), name = document.createElement("span"), bar = document.createElement("div"), words = document.createElement("span");
      row.className = "tier";
      name.textContent = tier.name;
      words.textContent = size(tier.nbytes) + (tier.limit === null ? "" : ` of ${size(tier.limit)}`);
      bar.className = "bar";
      bar.setAttribute("role", "img");
      bar.setAttribute("aria-label", `${tier.text}: ${tier.parts.map(([part, n]) => `${part} ${size(n)}`).join(", ")}`);
      bar.append(...tier.parts.map(([part, n]) => piece(part, (100 * n) / whole, `${part}: ${size(n)}`)));
      if (tier.limit) {
        const has = document.createElement("em"), line = document.createElement("u");
        has.style.width = line.style.left = `${(100 * tier.limit) / whole}%`;
        bar.prepend(has);
        bar.append(line);
      }
      row.append(name, bar, words);
      return row;
    }));
    $(".legend").replaceChildren(...tiers[0].parts.map(([part, n]) => {
      const item = document.createElement("span");
      item.append(piece(part, 0, ""), `${part} ${size(n)}`);
      return item;
    }));
  }

  function piece(part, width, title) {
    const made = document.createElement("i");
    made.className = `part part${PARTS.indexOf(part)}`;
    made.dataset.mark = part;
    made.style.width = width ? `${width}%` : "";
    made.title = title;
    return made;
  }

  function band({ rates, speed }) {
    const place = (rate) => 100 * Math.min(1, Math.max(0, Math.log(rate / SLOWEST) / Math.log(FASTEST / SLOWEST)));
    const shown = rates.expected !== undefined;
    $(".speed").textContent = speed;
    $(".scale").setAttribute("aria-label", `${speed}, on a scale from ${SLOWEST} to ${FASTEST}`);
    $(".scale i").hidden = $(".scale b").hidden = !shown;
    if (!shown) return;
    $(".scale i").style.left = `${place(rates.low)}%`;
    $(".scale i").style.width = `${place(rates.high) - place(rates.low)}%`;
    $(".scale b").style.left = `${place(rates.expected)}%`;
  }

  for (const field of root.querySelectorAll("[data-name]")) field[field.type === "range" ? "oninput" : "onchange"] = ask;
  model.on("change:choice", onChoice);
  model.on("change:answer", onAnswer);
  onChoice();
  onAnswer();
  return () => {
    silences.forEach(clearTimeout);
    forget();
    model.off("change:choice", onChoice);
    model.off("change:answer", onAnswer);
  };
}

export default { render };
