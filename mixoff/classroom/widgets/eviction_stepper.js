// One layer's cache, request by request. Python worked out every step; this shows them and asks before each eviction.
const FRAME = `
  <div class="bar">
    <label>Policy <select class="policy"></select></label>
    <button type="button" class="back" aria-label="one request back">Back</button>
    <button type="button" class="step" aria-label="one request on">Step</button>
    <button type="button" class="again">Start over</button>
    <span class="score"></span>
  </div>
  <div class="queue" role="img"></div>
  <div class="slots" role="group" aria-label="slots"></div>
  <div class="said" aria-live="polite"></div>`;

function render({ model, el }) {
  const requests = model.get("requests"), all = model.get("steps");
  const root = document.createElement("div");
  root.className = "mixoff-stepper";
  root.innerHTML = FRAME;
  el.replaceChildren(root);
  const $ = (name) => root.querySelector(name);
  let steps = null, at = -1, asking = false, right = 0, guesses = 0;

  $(".policy").replaceChildren(...Object.keys(all).map((name) => new Option(name, name)));

  function before() { // what lies in the slots before the next request
    return at < 0 ? steps[0].slots.map(() => null) : steps[at].slots;
  }

  function draw() {
    const done = steps.slice(0, at + 1), hits = done.filter((step) => step.hit).length;
    $(".queue").replaceChildren(...requests.map((expert, i) => {
      const item = document.createElement("span");
      item.textContent = expert;
      item.className = i === at + 1 ? "now" : i <= at ? "past" : "";
      return item;
    }));
    $(".queue").setAttribute("aria-label", at + 1 < requests.length ? `next request: expert ${requests[at + 1]}` : "no more requests");
    const last = at < 0 ? null : steps[at];
    $(".slots").replaceChildren(...before().map((expert, i) => {
      const slot = document.createElement("button");
      slot.type = "button";
      slot.disabled = !asking;
      slot.textContent = expert === null ? "empty" : expert;
      if (asking) slot.className = "ask";
      else if (last && expert === last.expert) {
        slot.className = last.hit ? "hit" : "miss";
        slot.textContent = `${expert} ${last.hit ? "h" : "M"}`;
      }
      const state = slot.className === "hit" ? ", hit" : slot.className === "miss" ? ", miss" : "";
      slot.setAttribute("aria-label", asking ? `give up expert ${expert}` : `slot ${i + 1}: ${expert === null ? "empty" : `expert ${expert}`}${state}`);
      slot.onclick = () => answer(expert);
      return slot;
    }));
    keepKeys(root);
    $(".back").disabled = at < 0;
    $(".step").disabled = asking || at === requests.length - 1;
    $(".score").textContent = guesses ? `${right} of ${guesses} guesses right` : "";
    Object.assign(root.dataset, { at: at + 1, hits, misses: done.length - hits, policy: $(".policy").value, asking });
  }

  function describe() {
    if (at < 0) return `Step to make the first of ${requests.length} requests.`;
    const step = steps[at];
    if (step.hit) return `Expert ${step.expert} is resident: a hit.`;
    if (step.evicted === null) return `Expert ${step.expert} takes an empty slot: a miss.`;
    return `Expert ${step.expert} takes the place of expert ${step.evicted}: a miss.`;
  }

  function say(text) {
    $(".said").textContent = text;
  }

  function next() {
    const coming = steps[at + 1];
    if (!coming) return;
    if (coming.evicted !== null && !asking) {
      asking = true;
      say(`Expert ${coming.expert} is not here and no slot is free. Whom does ${$(".policy").value} give up? Choose a slot.`);
      return draw();
    }
    asking = false;
    at += 1;
    say(describe());
    draw();
  }

  function answer(expert) {
    const correct = steps[at + 1].evicted;
    guesses += 1;
    right += expert === correct;
    const verdict = expert === correct ? "Right." : `No: ${$(".policy").value} keeps ${expert}.`;
    next();
    say(`${verdict} ${describe()}`);
    $(".step").focus();
  }

  function start() {
    steps = all[$(".policy").value];
    at = -1;
    asking = false;
    right = guesses = 0;
    say(describe());
    draw();
  }

  $(".step").onclick = next;
  $(".back").onclick = () => { asking = false; at -= 1; say(describe()); draw(); };
  $(".again").onclick = start;
  $(".policy").onchange = start;
  const dress = () => root.classList.toggle("mixoff-dark", isDark(el));
  start();
  requestAnimationFrame(dress);
  return onTheme(dress);
}

export default { render };
