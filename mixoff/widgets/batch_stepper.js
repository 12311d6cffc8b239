// A batch scheduler, pass by pass. Python worked out every pass; this shows them.
const FRAME = `
  <div class="bar">
    <label>Run <select class="run"></select></label>
    <button type="button" class="back" aria-label="one pass back">Back</button>
    <button type="button" class="step" aria-label="one pass on">Step</button>
    <input class="scrub" type="range" min="0" aria-label="pass">
  </div>
  <div class="plan" role="img"></div>
  <div class="bins" role="img"></div>
  <div class="said" aria-live="polite"></div>`;

function render({ model, el }) {
  const runs = model.get("runs"), letters = model.get("letters");
  const root = document.createElement("div");
  root.className = "mixoff-batch";
  root.innerHTML = FRAME;
  el.replaceChildren(root);
  const $ = (name) => root.querySelector(name);
  let passes = null, at = 0;

  $(".run").replaceChildren(...Object.keys(runs).map((name) => new Option(name, name)));

  function make(kind, text = "") {
    const item = document.createElement("span");
    item.className = kind;
    item.textContent = text;
    return item;
  }

  function drawPlan() { // a row for each job, a cell for each pass
    const rows = [...letters].map((letter, job) => {
      const row = make("row");
      row.append(make("name", letter), ...passes.map((pass, i) => {
        const here = pass.jobs.includes(job);
        return make(`cell ${here ? (pass.prompt ? "read" : "decode") : ""} ${i === at ? "now" : ""}`, here ? (pass.prompt ? "r" : "d") : "");
      }));
      return row;
    });
    $(".plan").replaceChildren(...rows);
    $(".plan").setAttribute("aria-label", `${letters.length} jobs, ${passes.length} passes; r reads a prompt, d decodes a token`);
  }

  function drawBins(pass) {
    const most = Math.max(...pass.wanted.map((jobs) => jobs.length), 1), size = Math.min(16, Math.floor(96 / most));
    $(".bins").style.setProperty("--ball", `${Math.max(size, 2)}px`);
    $(".bins").replaceChildren(...pass.wanted.map((jobs, expert) => {
      const bin = make("bin"), stack = make("stack");
      stack.append(...jobs.map((job) => make(`ball job${job % 4}`, size >= 12 ? letters[job] : "")));
      bin.append(stack, make("count", jobs.length), make("expert", `e${expert}`));
      return bin;
    }));
    $(".bins").setAttribute("aria-label", `requests by expert: ${pass.wanted.map((jobs) => jobs.length).join(", ")}`);
  }

  function describe(pass) {
    const names = [...new Set(pass.jobs)].map((job) => letters[job]).join(", "), loads = pass.wanted.map((jobs) => jobs.length);
    const touched = loads.filter(Boolean).length, all = loads.reduce((a, b) => a + b, 0);
    const what = pass.prompt ? `reads ${pass.jobs.length} prompt tokens of ${names}` : `decodes ${pass.jobs.length > 1 ? "one token each" : "a token"} of ${names}`;
    return `Pass ${at + 1} of ${passes.length}, step ${pass.step}: ${what}. ${all} requests touch ${touched} of ${loads.length} experts; the busiest gets ${Math.max(...loads)}.`;
  }

  function draw() {
    const pass = passes[at];
    drawPlan();
    drawBins(pass);
    $(".said").textContent = describe(pass);
    $(".back").disabled = at === 0;
    $(".step").disabled = at === passes.length - 1;
    $(".scrub").max = passes.length - 1;
    $(".scrub").value = at;
    $(".scrub").setAttribute("aria-valuetext", `pass ${at + 1} of ${passes.length}`);
    keepKeys(root);
    const touched = pass.wanted.filter((jobs) => jobs.length).length;
    Object.assign(root.dataset, { at, passes: passes.length, touched, prompt: pass.prompt });
  }

  $(".step").onclick = () => { at += 1; draw(); };
  $(".back").onclick = () => { at -= 1; draw(); };
  $(".scrub").oninput = () => { at = Number($(".scrub").value); draw(); };
  $(".run").onchange = () => { passes = runs[$(".run").value]; at = 0; draw(); };
  const dress = () => root.classList.toggle("mixoff-dark", isDark(el));
  passes = runs[$(".run").value];
  draw();
  requestAnimationFrame(dress);
  return onTheme(dress);
}

export default { render };
