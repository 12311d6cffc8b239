"""Conversations: what the model reads is what transformers' template writes, once; what does not fit is forgotten."""

import pytest
import torch

import mixoff
from mixoff import MixoffError, models
from mixoff.text import generation
from mixoff.text.chat import PLAIN, Chat, recent

# as Mixtral-8x7B-Instruct has it on the Hub, with strict turns
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def model():
    with mixoff.load("tiny-mixtral", "6MB", prefetch="none") as loaded:
        yield loaded


@pytest.fixture
def tokenizer():
    return generation.load_tokenizer(models.path())


class Heard:
    """A streamer that keeps what it hears."""

    def __init__(self):
        self.ids, self.ended = [], 0

    def put(self, ids):
        self.ids.append(ids.flatten().tolist())

    def end(self):
        self.ended += 1


def test_turns_are_written_by_the_model_s_template(model, tokenizer):
    tokenizer.chat_template = INSTRUCT
    chat, heard = Chat(model, tokenizer), Heard()
    first = chat.ask("Who are you?", 6)
    second = chat.ask("Why?", 5, streamer=heard)
    assert chat.own_template and [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    written = f"<s>[INST] Who are you? [/INST]{first.text.strip()}</s>[INST] Why? [/INST]"
    expected = tokenizer(written, add_special_tokens=False)["input_ids"]
    assert heard.ids[0] == expected and expected.count(tokenizer.bos_token_id) == 1
    assert [i for piece in heard.ids[1:] for i in piece] == second.token_ids and heard.ended == 1
    with torch.no_grad():
        want = model.generate(torch.tensor([expected]), max_new_tokens=5, do_sample=False, pad_token_id=2)
    assert want[0, len(expected) :].tolist() == second.token_ids


def test_a_model_that_was_never_taught_to_chat_continues_the_text(model, tokenizer):
    tokenizer.chat_template = None
    chat = Chat(model, tokenizer)
    assert not chat.own_template
    answer = chat.ask("It was a fine morning", 4)
    assert chat.prompt(chat.messages) == f"<s>It was a fine morning\n{answer.text.strip()}\n"
    assert tokenizer.chat_template is None and "messages" in PLAIN


def test_the_bundled_model_s_template_writes_turns_on_lines_of_their_own(model, tokenizer):
    assert tokenizer.chat_template == PLAIN and Chat(model, tokenizer).own_template


def test_what_no_longer_fits_is_forgotten_oldest_turn_first(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.config, "max_position_embeddings", 60)
    tokenizer.chat_template = INSTRUCT  # refuses turns that begin with an answer
    chat = Chat(model, tokenizer)
    for n in range(5):
        chat.ask(f"Question {n}: and then, what happened in the house?", 12)
    first = chat.messages[0]["content"]
    assert chat.messages[0]["role"] == "user" and 2 <= len(chat.messages) < 10 and "Question 0" not in first
    assert "Question 4" in chat.messages[-2]["content"]
    with pytest.raises(MixoffError, match="exceed the model's context of 60"):
        chat.ask("far too long " * 40, 12)
    short = Chat(model, tokenizer, list(chat.messages), context=40)
    short.ask("And then?", 12)
    assert [message["content"] for message in short.messages[:-1]] == ["And then?"]
    assert "Question 4" in chat.messages[-2]["content"], "a question that failed is no part of the conversation"


def test_the_last_question_always_stays():
    turns = [{"role": "user", "content": str(i)} for i in range(3)]
    assert recent(turns, lambda part: 100, 1) == turns[-1:]
    assert recent(turns, len, 2) == turns[1:]


def test_a_system_message_stays_when_turns_are_forgotten(model, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    system = {"role": "system", "content": "Be brief."}
    chat = Chat(model, tokenizer, [system], context=70)
    for n in range(4):
        chat.ask(f"Question {n}: and then, what happened?", 12)
    assert chat.messages[0] == system and "Question 0" not in str(chat.messages) and "Question 3" in str(chat.messages)
    assert chat.prompt(chat.messages).startswith("<system>Be brief.\n<user>")


TEMPLATES = {
    "strict": ("{{ raise_exception('only user and\nassistant') }}", "refuses these messages: only user and; change"),
    "unsafe": ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
    "broken": ("{% for", "unexpected 'end of template'"),
    "wrong": ("{{ 1 + 'a' }}", "unsupported operand"),
    "deep": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
    "endless": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "runs more than 1,000,000 lines, so it may never end",
    ),
    "endless with output": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
        "so it may never end",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_that_refuse_or_never_end_are_one_sentence(model, tokenizer, name):
    import sys

    tokenizer.chat_template, message = TEMPLATES[name]
    before = sys.gettrace()
    with pytest.raises(MixoffError, match=message) as caught:
        Chat(model, tokenizer).ask("Who are you?", 2)
    assert "\n" not in str(caught.value) and sys.gettrace() is before


def test_a_template_with_many_messages_is_within_the_limit(model, tokenizer):
    tokenizer.chat_template = INSTRUCT
    turns = [{"role": role, "content": "a"} for _ in range(2000) for role in ("user", "assistant")]
    assert Chat(model, tokenizer).prompt(turns).count("[INST]") == 2000
