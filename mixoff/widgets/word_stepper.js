// Sixteen codes in one word, four at a time. Python worked out every step; this shows them.
const FRAME = `
  <div class="bar">
    <button type="button" class="back" aria-label="one step back">Back</button>
    <button type="button" class="step" aria-label="one step on">Step</button>
    <button type="button" class="again">Start over</button>
    <span class="score"></span>
  </div>
  <div class="lines"></div>
  <div class="products"></div>
  <div class="said" aria-live="polite"></div>`;

function render({ model, el }) {
  const word = model.get("word"), activations = model.get("activations"), steps = model.get("steps");
  const root = document.createElement("div");
  root.className = "mixoff-word";
  root.innerHTML = FRAME;
  el.replaceChildren(root);
  const $ = (name) => root.querySelector(name);
  let at = -1;

  // a row of bits, from the highest on: `kept` says which of them are shown in colour
  function line(name, value, kept, hidden = () => false) {
    const row = document.createElement("div"), label = document.createElement("b"), bits = document.createElement("span");
    row.className = "line";
    label.textContent = name;
    bits.className = "bits";
    for (let byte = 3; byte >= 0; byte--) {
      const group = document.createElement("span");
      group.className = "byte";
      for (let bit = 8 * byte + 7; bit >= 8 * byte; bit--) {
        const cell = document.createElement("i");
        cell.textContent = hidden(bit) ? "·" : Math.floor(value / 2 ** bit) % 2;
        if (kept(bit)) cell.className = "kept";
        group.append(cell);
      }
      bits.append(group);
    }
    row.append(label, bits);
    row.setAttribute("role", "img");
    row.setAttribute("aria-label", `${name}: ${value.toString(2).padStart(32, "0")}`);
    return row;
  }

  function product(code, input) {
    const cell = document.createElement("span");
    cell.className = "product";
    cell.textContent = `${code} × ${activations[input]}`;
    cell.title = `code ${input} times activation ${input}`;
    return cell;
  }

  function draw() {
    const step = at < 0 ? null : steps[at];
    const low = (bit) => bit % 8 < 2, field = (bit) => step && bit >= step.shift && low(bit - step.shift);
    const rows = [line("word", word, field)];
    if (step) {
      rows.push(line(`>> ${step.shift}`, step.shifted, low));
      rows.push(line("& 03030303", step.shifted, low, (bit) => !low(bit)));
    }
    $(".lines").replaceChildren(...rows);
    $(".products").replaceChildren(...(step ? step.codes.map((code, i) => product(code, step.inputs[i])).reverse() : []));
    $(".score").textContent = step ? `step ${at + 1} of ${steps.length}, sum ${step.total}` : "";
    $(".back").disabled = at < 0;
    $(".step").disabled = at === steps.length - 1;
    $(".said").textContent = step
      ? `Codes ${step.inputs.join(", ")} are now alone in their bytes. One instruction multiplies all four; their sum so far is ${step.total}.`
      : `One word holds ${activations.length} codes, code 0 in the lowest two bits. Step to take the first four.`;
    keepKeys(root);
    Object.assign(root.dataset, { at: at + 1, total: step ? step.total : 0 });
  }

  $(".step").onclick = () => { at += 1; draw(); };
  $(".back").onclick = () => { at -= 1; draw(); };
  $(".again").onclick = () => { at = -1; draw(); };
  const dress = () => root.classList.toggle("mixoff-dark", isDark(el));
  draw();
  requestAnimationFrame(dress);
  return onTheme(dress);
}

export default { render };
