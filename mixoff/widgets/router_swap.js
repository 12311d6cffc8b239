// A router whose choice is moved down its own ranking. Python measured every pair; this looks them up.
const FRAME = `
  <label><span>One expert has rank</span><input class="one" type="range" min="1" value="1" aria-label="rank of one expert"><output></output></label>
  <label><span>the other has rank</span><input class="two" type="range" min="1" value="2" aria-label="rank of the other expert"><output></output></label>
  <div class="bar"><button type="button" class="reset">As trained</button></div>
  <div class="ranks" role="img"></div>
  <div class="loss" aria-live="polite"></div>
  <div class="scale" role="img"><i data-mark="loss"></i></div>
  <div class="text"></div>`;

function render({ model, el }) {
  const E = model.get("experts"), uniform = model.get("uniform");
  const rows = new Map(model.get("rows").map(([ranks, loss, text]) => [ranks.join(), { loss, text }]));
  const { root, $, forget } = plant(el, "swap", FRAME);
  const most = 1.04 * Math.max(uniform, ...[...rows.values()].map((row) => row.loss)), trained = rows.get("1,2").loss;
  const mark = (name, value, shift) => {
    const line = make("u", { data: { name, mark: "limit" } });
    line.style.left = `${(100 * value) / most}%`;
    line.style.setProperty("--shift", shift);
    return line;
  };
  $(".scale").append(mark("as trained", trained, "-50%"), mark("all words equally likely", uniform, "-85%"));
  for (const name of [".one", ".two"]) Object.assign($(name), { max: E, oninput: show });
  $(".reset").onclick = () => { $(".one").value = 1; $(".two").value = 2; show(); };

  function show() {
    const chosen = [...new Set([Number($(".one").value), Number($(".two").value)])].sort((a, b) => a - b), { loss, text } = rows.get(chosen.join());
    const words = chosen.length === 2 ? `Ranks ${chosen.join(" and ")}` : `Rank ${chosen[0]} alone`;
    for (const name of [".one", ".two"]) $(name).nextElementSibling.textContent = `${$(name).value} of ${E}`;
    $(".ranks").replaceChildren(...Array.from({ length: E }, (_, i) => {
      const used = chosen.includes(i + 1);
      return make("span", { textContent: i + 1, className: used ? (i < 2 ? "used" : "used wrong") : "", data: used ? { mark: i < 2 ? "used" : "wrong" } : {} });
    }));
    $(".ranks").setAttribute("aria-label", `experts by rank; used: ${chosen.join(" and ")}`);
    const change = loss - trained;
    $(".loss").textContent = `${words}: loss ${loss.toFixed(2)} ${model.get("about")}, ${chosen.join() === "1,2" ? "as trained" : `${change < 0 ? "−" : "+"}${Math.abs(change).toFixed(2)} against the trained router`}.`;
    $(".scale i").style.width = `${(100 * loss) / most}%`;
    $(".scale i").style.background = `var(--${chosen.includes(1) ? "hit" : "miss"})`;
    $(".scale").setAttribute("aria-label", `loss ${loss.toFixed(2)}, as trained ${trained.toFixed(2)}, all words equally likely ${uniform.toFixed(2)}`);
    $(".text").replaceChildren(model.get("lead"), make("b", { textContent: text }));
    Object.assign(root.dataset, { ranks: chosen.join(), loss });
  }

  show();
  return forget;
}

export default { render };
