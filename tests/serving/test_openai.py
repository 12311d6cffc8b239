"""The endpoints through OpenAI's own client: what it asks for, and what it makes of the replies.

Texts are compared with `generate` of the same model, which knows no server and no batch.
"""

import json
import math

import openai
import pytest
import torch

import served as support
from mixoff.serving.fields import TextAsked
from mixoff.serving.served import sampling
from served import NAME, said_alone

PROMPT = "It was a fine morning in the spring"
QUESTION = [{"role": "user", "content": PROMPT}]


def text(client, prompt=PROMPT, **options):
    options = {"max_tokens": 8, "temperature": 0} | options
    return client.completions.create(model=NAME, prompt=prompt, **options)


def chat(client, messages=QUESTION, **options):
    options = {"max_tokens": 8, "temperature": 0} | options
    return client.chat.completions.create(model=NAME, messages=messages, **options)


def joined(stream, index=0):
    """The text of one choice of a stream of completions."""
    return "".join(c.text for event in stream for c in event.choices if c.index == index)


# Models ---------------------------------------------------------------------------------------------------------------


def test_models_are_listed_and_found(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by, model.context_length) == (NAME, "model", "mixoff", 256)
    assert client.models.retrieve(NAME).id == NAME


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'.*it serves 'small'"):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.completions.create(model="gpt-4", prompt="a")


# Completions ----------------------------------------------------------------------------------------------------------


def test_greedy_text_is_that_of_generate(client, model):
    reply = text(client, max_tokens=20)
    assert reply.choices[0].text == said_alone(model, PROMPT, 20)
    assert (reply.object, reply.choices[0].finish_reason, reply.model) == ("text_completion", "length", NAME)
    assert reply.id.startswith("cmpl-") and reply.created > 1_700_000_000


SAMPLED = {
    "warm": {"temperature": 0.8},
    "top_p": {"temperature": 1.0, "top_p": 0.5},
    "top_k": {"temperature": 1.3, "top_k": 7},
    "both": {"temperature": 0.9, "top_k": 40, "top_p": 0.9},
}


@pytest.mark.parametrize("sampling", SAMPLED.values(), ids=SAMPLED)
def test_a_seed_gives_the_text_that_generate_gives(client, model, sampling):
    extra = {"top_k": sampling["top_k"]} if "top_k" in sampling else {}
    openai_options = {name: value for name, value in sampling.items() if name != "top_k"}
    reply = text(client, max_tokens=16, seed=11, **openai_options, extra_body=extra)
    assert reply.choices[0].text == said_alone(model, PROMPT, 16, seed=11, **sampling)


def test_without_a_seed_answers_differ(client):
    texts = {text(client, temperature=1.0, max_tokens=12).choices[0].text for _ in range(4)}
    assert len(texts) > 1  # 4 equal texts of 12 tokens: less than once in a million runs


def test_default_temperature_is_one(client, model):
    reply = client.completions.create(model=NAME, prompt=PROMPT, seed=3, max_tokens=16)
    assert reply.choices[0].text == said_alone(model, PROMPT, 16, seed=3, temperature=1.0)


def test_default_limit_is_sixteen_tokens(client):
    assert client.completions.create(model=NAME, prompt=PROMPT, temperature=0).usage.completion_tokens == 16


def test_usage_counts_prompt_and_new_tokens(client, model):
    usage, ids = text(client).usage, model.tokenizer(PROMPT)["input_ids"]
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), 8)
    assert usage.total_tokens == len(ids) + 8


def test_several_answers_have_seeds_of_their_own(client, model):
    reply = text(client, n=3, seed=5, temperature=1.0)
    alone = [said_alone(model, PROMPT, 8, seed=5 + i, temperature=1.0) for i in range(3)]
    assert [choice.text for choice in reply.choices] == alone and len(set(alone)) == 3
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert reply.usage.prompt_tokens == text(client).usage.prompt_tokens, "one prompt is counted once"


def test_a_list_of_prompts(client, model):
    prompts = ["It was", "The capital of Spain is", "def main(args):"]
    reply = text(client, prompts)
    assert [choice.text for choice in reply.choices] == [said_alone(model, prompt, 8) for prompt in prompts]


def test_prompts_as_tokens(client, model):
    ids = model.tokenizer(PROMPT)["input_ids"]
    assert text(client, ids).choices[0].text == text(client).choices[0].text
    assert [choice.text for choice in text(client, [ids, ids[:4]]).choices][0] == text(client).choices[0].text


def test_echo_repeats_the_prompt(client):
    assert text(client, echo=True).choices[0].text == PROMPT + text(client).choices[0].text


def test_stop_strings_end_and_are_left_out(client):
    whole = text(client, max_tokens=24).choices[0].text
    stop = whole[10:14]
    reply = text(client, max_tokens=24, stop=[stop, "never said"])
    assert reply.choices[0].text == whole[: whole.find(stop)] and reply.choices[0].finish_reason == "stop"
    assert text(client, max_tokens=24, stop=stop).choices[0].text == reply.choices[0].text
    streamed = joined(text(client, max_tokens=24, stop=stop, stream=True))
    assert streamed == reply.choices[0].text, "no part of a stop string may be sent"


def test_a_stop_string_of_a_million_characters_costs_nothing(client):
    whole = text(client).choices[0].text
    assert text(client, stop=[whole[-2:] + "a" * 1_000_000, "b" * 1_000_000]).choices[0].text == whole


def test_what_only_begins_like_a_stop_string_is_sent(client):
    whole = text(client, max_tokens=24).choices[0].text
    stop = whole[-3:] + "and something that is never said"
    assert text(client, max_tokens=24, stop=stop).choices[0].text == whole


def test_logprobs_are_those_of_the_model(client, model):
    reply = text(client, logprobs=3, max_tokens=4)
    logprobs, ids = reply.choices[0].logprobs, model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        raw = torch.log_softmax(model.model(ids).logits[0, -1].float(), -1)
    assert math.isclose(logprobs.token_logprobs[0], float(raw.max()), abs_tol=1e-4)
    assert len(logprobs.top_logprobs[0]) == 3 and len(logprobs.tokens) == 4
    assert "".join(logprobs.tokens) == reply.choices[0].text
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(4)]


def test_logprobs_do_not_depend_on_temperature(client):
    options = {"logprobs": 2, "max_tokens": 1, "seed": 1}
    cold, warm = (text(client, temperature=t, **options).choices[0].logprobs for t in (0, 1.7))
    assert cold.top_logprobs == warm.top_logprobs


def test_a_prompt_is_scored_without_a_new_token(client, model):
    reply = text(client, echo=True, logprobs=0, max_tokens=0)
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        raw = torch.log_softmax(model.model(ids).logits[0].float(), -1)
    want = raw[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
    first, *scores = reply.choices[0].logprobs.token_logprobs
    assert first is None and scores == pytest.approx(want, abs=1e-4)
    assert reply.choices[0].text == PROMPT and reply.usage.completion_tokens == 0


def test_a_prompt_is_scored_and_continued(client):
    reply = text(client, echo=True, logprobs=1, max_tokens=3)
    plain = text(client, logprobs=1, max_tokens=3)
    assert reply.choices[0].logprobs.token_logprobs[-3:] == pytest.approx(plain.choices[0].logprobs.token_logprobs)
    assert reply.choices[0].text == PROMPT + plain.choices[0].text


def test_bias_forces_and_forbids_tokens(client, model):
    token = model.tokenizer(" fine", add_special_tokens=False)["input_ids"][-1]
    assert text(client, logit_bias={str(token): 100}, max_tokens=3).choices[0].text == model.spell(token) * 3
    first = text(client, logprobs=1, max_tokens=1).choices[0].logprobs.tokens[0]
    likely = model.tokenizer.convert_tokens_to_ids(model.tokenizer.tokenize(first))[-1]
    assert text(client, logit_bias={str(likely): -100}, max_tokens=1).choices[0].text != first


def test_penalties_prevent_repetition(client):
    bias = {"300": 50}  # one token that would be said again and again
    assert len(set(text(client, logit_bias=bias, logprobs=0).choices[0].logprobs.tokens)) == 1
    for penalty in ("presence_penalty", "frequency_penalty"):
        reply = text(client, logit_bias={"300": 41, "400": 40}, logprobs=0, **{penalty: 2.0})
        assert len(set(reply.choices[0].logprobs.tokens)) == 2, penalty
    reply = text(client, extra_body={"repetition_penalty": 50.0}, logprobs=0, max_tokens=12)
    tokens = reply.choices[0].logprobs.tokens
    assert len(set(tokens)) == len(tokens)


def test_min_p_of_one_is_greedy(client):
    reply = text(client, temperature=1.0, seed=9, extra_body={"min_p": 1.0})
    assert reply.choices[0].text == text(client).choices[0].text


def test_the_model_may_end_its_answer(client):
    reply = text(client, logit_bias={"2": 100}, max_tokens=9)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("", "stop")
    reply = text(client, logit_bias={"2": 100}, max_tokens=9, extra_body={"ignore_eos": True})
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (9, "length")


# Streams --------------------------------------------------------------------------------------------------------------


def test_a_stream_is_the_whole_text_in_pieces(client):
    events = list(text(client, max_tokens=16, stream=True))
    assert joined(events) == text(client, max_tokens=16).choices[0].text
    assert len([e for e in events if e.choices[0].text]) > 4, "the text must come in pieces"
    assert [e.choices[0].finish_reason for e in events][-1] == "length"
    assert len({e.id for e in events}) == 1 and all(e.usage is None for e in events)


def test_a_stream_ends_with_usage_where_asked(client):
    events = list(text(client, stream=True, stream_options={"include_usage": True}))
    assert events[-1].choices == [] and events[-1].usage.completion_tokens == 8
    assert all(event.usage is None for event in events[:-1])


def test_a_stream_of_several_answers(client):
    options = {"n": 2, "seed": 1, "temperature": 1.0}
    events = list(text(client, stream=True, **options))
    whole = text(client, **options)
    assert [joined(events, i) for i in (0, 1)] == [choice.text for choice in whole.choices]


def test_a_stream_carries_logprobs(client):
    events = list(text(client, stream=True, logprobs=1))
    parts = [event.choices[0].logprobs for event in events if event.choices[0].logprobs]
    whole = text(client, logprobs=1).choices[0].logprobs
    assert [t for part in parts for t in part.tokens] == whole.tokens
    assert [o for part in parts for o in part.text_offset] == whole.text_offset


def test_a_stream_with_echo(client):
    assert joined(text(client, stream=True, echo=True)) == PROMPT + text(client).choices[0].text


def test_the_wire_ends_with_done(server):
    body = {"model": NAME, "prompt": "a", "max_tokens": 2, "stream": True}
    reply = server.post("/v1/completions", body)
    lines = [line for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: {") for line in lines[:-1])
    assert reply.headers["content-type"].startswith("text/event-stream")


# Chats ----------------------------------------------------------------------------------------------------------------


def test_a_chat_is_answered(client, model):
    reply = chat(client)
    prompt = model.chat.prompt(QUESTION)
    want = support.generation.generate(model.model, model.tokenizer, prompt, 8, add_special_tokens=False).text
    choice = reply.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", want, "length")
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-")


def test_a_chat_streams(client):
    events = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert events[0].choices[0].delta.role == "assistant" and events[0].choices[0].delta.content == ""
    pieces = [event.choices[0].delta.content or "" for event in events if event.choices]
    assert "".join(pieces) == chat(client).choices[0].message.content
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "length"
    assert events[-1].usage.completion_tokens == 8


def test_a_chat_with_system_history_and_parts(client):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "It was "}, {"type": "text", "text": "fine"}]},
        {"role": "assistant", "content": "Indeed."},
        {"role": "user", "content": "And then?"},
    ]
    joined_parts = [messages[0], {"role": "user", "content": "It was fine"}, *messages[2:]]
    assert chat(client, messages).choices[0].message.content == chat(client, joined_parts).choices[0].message.content


def test_chat_logprobs(client):
    reply = chat(client, logprobs=True, top_logprobs=2, max_tokens=3)
    content = reply.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == reply.choices[0].message.content
    for entry in content:
        assert entry.logprob == entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token


def test_chat_logprobs_stream(client):
    events = list(chat(client, logprobs=True, max_tokens=3, stream=True))
    entries = [e for event in events if event.choices[0].logprobs for e in event.choices[0].logprobs.content]
    whole = chat(client, logprobs=True, max_tokens=3).choices[0].logprobs.content
    assert [e.token for e in entries] == [e.token for e in whole] and entries[0].top_logprobs == []


def test_both_names_of_the_limit(client):
    assert chat(client, max_tokens=None, max_completion_tokens=3).usage.completion_tokens == 3
    assert chat(client, max_tokens=9, max_completion_tokens=3).usage.completion_tokens == 3


def test_a_chat_without_a_limit_fills_the_context(client):
    reply = chat(client, max_tokens=None, extra_body={"ignore_eos": True})
    assert reply.usage.total_tokens == 256 and reply.choices[0].finish_reason == "length"


def test_several_answers_to_a_chat(client):
    reply = chat(client, n=2, temperature=1.0, seed=4)
    assert len({choice.message.content for choice in reply.choices}) == 2
    again = [chat(client, temperature=1.0, seed=4 + i).choices[0].message.content for i in range(2)]
    assert [choice.message.content for choice in reply.choices] == again


def test_fields_that_change_nothing_are_ignored(client):
    reply = chat(client, user="me", metadata={"a": "b"}, store=False, service_tier="auto", tools=[])
    assert reply.choices[0].message.content == chat(client).choices[0].message.content


# JSON -----------------------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["cat", "dog"]},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind", "ages"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_follows_its_schema(client, seed):
    """A random model, so that nothing but the grammar can have made it valid."""
    wanted = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}
    reply = chat(client, response_format=wanted, temperature=1.0, seed=seed, max_tokens=120)
    said = json.loads(reply.choices[0].message.content)
    assert set(said) == {"name", "kind", "ages"} and said["kind"] in ("cat", "dog") and len(said["name"]) <= 12
    assert reply.choices[0].finish_reason == "stop" and all(0 <= age <= 99 for age in said["ages"])


def test_an_object_begins_like_one(client):
    reply = text(client, extra_body={"response_format": {"type": "json_object"}}, max_tokens=4)
    assert reply.choices[0].text.startswith("{")
    assert (
        chat(client, response_format={"type": "text"}).choices[0].message.content
        == chat(client).choices[0].message.content
    )


# Refusals -------------------------------------------------------------------------------------------------------------

REFUSED = {
    "unknown": ({"max_tokns": 3}, "unknown field 'max_tokns'; did you mean 'max_tokens'"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported: ask for JSON"),
    "suffix": ({"suffix": "end"}, "suffix is not supported: put the text that follows into the prompt"),
    "best_of": ({"best_of": 3}, "best_of is not supported: ask for n answers"),
    "hot": ({"temperature": 101}, "temperature: Input should be less than or equal to 100"),
    "cold": ({"temperature": -0.1}, "temperature: Input should be greater than or equal to 0"),
    "top_p": ({"top_p": 1.5}, "top_p: Input should be less than or equal to 1"),
    "many": ({"n": 1000}, "n: Input should be less than or equal to 128"),
    "penalty": ({"presence_penalty": 3}, "presence_penalty: Input should be less than or equal to 2"),
    "bias": ({"logit_bias": {"4096": 1}}, "logit_bias names token '4096': this model knows 0 to 4095"),
    "bias name": ({"logit_bias": {"a": 1}}, "logit_bias names token 'a'"),
    "stops": ({"stop": ["a"] * 17}, "stop has 17 texts: give at most 16"),
    "token": ({"prompt": [1, 5000]}, "the prompt holds token 5000: this model knows 0 to 4095"),
    "context": ({"max_tokens": 300}, "300 new ones are more than this server's context of 256 holds"),
    "long": ({"prompt": "word " * 600}, "tokens of prompt"),
    "type": ({"prompt": 3}, "prompt"),
    "prompts": ({"prompt": ["a"] * 100_000, "n": 100}, "asks for 100000 prompts with 100 answers each"),
    "biases": ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias names 2000 tokens: give at most 1024"),
    "empty": ({"prompt": []}, "prompt is an empty list"),
    "no tokens": ({"prompt": [[]]}, "the prompt is empty"),
    "surrogate": ({"prompt": "caf\udce9"}, "not valid Unicode"),
    "logprobs": ({"logprobs": 21}, "logprobs"),
    "schema": ({"response_format": {"type": "json_schema"}}, "response_format of type json_schema needs"),
    "bad schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
        "response_format: ",
    ),
    "format": ({"response_format": {"type": "xml"}}, "response_format.type"),
    "endless": ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "leave out ignore_eos"),
}


@pytest.mark.parametrize("fields, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_refused_in_words(server, fields, message):
    body = {"model": NAME, "prompt": "a", "max_tokens": 2} | fields
    reply = server.post("/v1/completions", body)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"]
    assert message in error["message"] or not server.ours, error


REFUSED_CHATS = {
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "reads text only"),
    "role": ({"messages": [{"content": "a"}]}, "a message needs a role"),
    "none": ({"messages": []}, "messages: List should have at least 1 item"),
    "content": ({"messages": [{"role": "user", "content": 5}]}, "is a text, or a list of parts"),
    "top_logprobs": ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
    "limit": ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
    "missing": ({"messages": None}, "messages"),
    "variables": ({"chat_template_kwargs": {"conversation": [], "messages": 3}}, "chat template refuses"),
}


@pytest.mark.parametrize("fields, message", REFUSED_CHATS.values(), ids=REFUSED_CHATS)
def test_chats_that_cannot_be_answered_are_refused_in_words(server, fields, message):
    reply = server.post("/v1/chat/completions", {"model": NAME, "messages": QUESTION} | fields)
    assert reply.status_code == 400, reply.text
    assert message in reply.json()["error"]["message"] or not server.ours, reply.text


def test_the_client_turns_refusals_into_its_errors(client):
    with pytest.raises(openai.BadRequestError, match="context of 256"):
        text(client, max_tokens=1000)


def test_what_was_not_asked_for_is_as_the_model_recommends(model):
    from transformers import GenerationConfig

    own = GenerationConfig(temperature=0.6, top_p=0.95, top_k=20)
    asked = TextAsked(model=NAME, prompt="a", top_p=0.5, presence_penalty=1.0)
    settings = sampling(asked, 7, None, 4096, own)
    assert (settings.temperature, settings.top_p, settings.top_k) == (0.6, 0.5, 20)
    assert (settings.presence_penalty, settings.seed, settings.top_logprobs) == (1.0, 7, None)
    assert sampling(asked, 7, None, 4096).temperature == 1.0
