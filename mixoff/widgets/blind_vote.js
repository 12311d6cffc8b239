// Two texts, one of them written with fewer bits. The reader votes, then sees which, and at the end what a coin would do.
const FRAME = `
  <div class="ask"></div>
  <div class="texts"><div class="left"></div><div class="right"></div></div>
  <div class="bar">
    <button type="button" class="vote" data-side="left">Left</button>
    <button type="button" class="vote" data-side="right">Right</button>
    <button type="button" class="next" disabled>Next</button>
    <button type="button" class="again" hidden>Vote again</button>
  </div>
  <div class="said" aria-live="polite"></div>
  <div class="score"></div>`;

function render({ model, el }) {
  const rounds = model.get("rounds"), name = model.get("name"), chances = model.get("chances");
  const { root, $, forget } = plant(el, "vote", FRAME);
  let at = 0, votes = [];

  function show() {
    const round = rounds[at], voted = at < votes.length, last = at === rounds.length - 1;
    $(".ask").textContent = `Round ${at + 1} of ${rounds.length}: one text is written by the ${name} model. Which one?`;
    for (const side of ["left", "right"]) {
      const fewer = voted && round.side === side;
      const said = voted ? (fewer ? name : "16 bits") : side;
      $(`.${side}`).replaceChildren(make("small", { textContent: said }), make("i", { textContent: round.lead }), round[side]);
      $(`.${side}`).classList.toggle("fewer", fewer);
      $(`.${side}`).dataset.mark = "frame";
    }
    for (const button of root.querySelectorAll(".vote")) button.disabled = voted;
    $(".next").disabled = !voted || last;
    $(".again").hidden = !voted || !last;
    const right = votes.filter((vote, i) => vote === rounds[i].side).length;
    $(".said").textContent = voted ? (votes[at] === round.side ? "Right." : `No: the ${round.side} one is ${name}.`) : "";
    $(".score").textContent = !votes.length ? "" : `${right} of ${votes.length} right` + (voted && last ? `. A coin is right as often or more with a chance of ${(100 * chances[right]).toFixed(0)} %.` : "");
    Object.assign(root.dataset, { round: at, votes: votes.length, right });
  }

  for (const button of root.querySelectorAll(".vote")) button.onclick = () => {
    votes.push(button.dataset.side);
    show();
    (at === rounds.length - 1 ? $(".again") : $(".next")).focus();
  };
  $(".next").onclick = () => { at += 1; show(); $(".vote").focus(); };
  $(".again").onclick = () => { at = 0; votes = []; show(); $(".vote").focus(); };
  show();
  return forget;
}

export default { render };
