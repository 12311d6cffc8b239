"""How the bundled model was made: its card is the text that its stored figures give."""

import json

from transformers import AutoModelForCausalLM

import model_card
from mixoff import models


def test_the_bundled_card_is_made_from_the_stored_figures():
    folder = models.path()
    figures, training = (json.loads((folder / f"{name}.json").read_text("utf8")) for name in ("figures", "training"))
    card = model_card.card(AutoModelForCausalLM.from_pretrained(folder), figures, training)
    assert card == (folder / "README.md").read_text(encoding="utf8")
