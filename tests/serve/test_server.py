"""The server as OpenAI's own client, and others, see it."""

import copy
import http.client
import json
import threading
import time
from contextlib import closing, contextmanager

import openai
import pytest
import torch
import uvicorn
from peft import LoraConfig, get_peft_model
from prometheus_client.parser import text_string_to_metric_families
from support import randomise

from repeng import SteeringVector, tiny
from repeng.serve import Batching, Dials, Limits, make_app

TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {{ message.content }} . {% endfor %}"
    "{% if shout is defined %}loud {% endif %}"
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
)


def model_with_dials():
    base, tokenizer = tiny.load()
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), adapter_name="own")
    randomise(adapted, 0.3)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    vector = SteeringVector({("residual", 2): torch.randn(128)})
    return Dials(base, {"honest": "own"}, {"mood": vector}), tokenizer


@contextmanager
def serving(limits=None, api_key=None, hosts=("127.0.0.1", "localhost")):
    """A server on a free port of this machine; gives (port, dials, tokenizer, batching)."""
    torch.manual_seed(0)
    dials, tokenizer = model_with_dials()
    batching = Batching(dials, limits)
    app = make_app(batching, tokenizer, "tiny", api_key, hosts)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
            assert thread.is_alive()
        yield server.servers[0].sockets[0].getsockname()[1], dials, tokenizer, batching
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def running():
    with serving(Limits(max_concurrent=8, max_length=200)) as it:
        yield it


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{running[0]}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def expected(running):
    """Greedy texts at coefficients, by `generate` on a model of its own."""
    torch.manual_seed(0)
    dials, tokenizer = model_with_dials()

    def answer(prompt, n, is_chat=False, **steering):
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not is_chat)
        with dials.at(steering):
            out = dials.model.generate(**ids, max_new_tokens=n, do_sample=False)[0, ids["input_ids"].shape[1] :]
        return tokenizer.decode(out, skip_special_tokens=True)

    return answer


def ask(running, path, body=None, headers=None):
    """Status and JSON of a bare request; `body` may be bytes that are no JSON."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    with closing(http.client.HTTPConnection("127.0.0.1", running[0], timeout=60)) as connection:
        connection.request("GET" if body is None else "POST", path, data, headers or {})
        response = connection.getresponse()
        text = response.read()
    return response.status, json.loads(text) if text.startswith(b"{") else text.decode()


def test_completions_are_steered_per_request(client, expected):
    for steering in ({}, {"honest": 1.0}, {"honest": -1.0}, {"mood": 2.0, "honest": 0.5}):
        answer = client.completions.create(
            model="tiny", prompt="the lime is", max_tokens=12, temperature=0, extra_body={"steer": steering}
        )
        assert answer.choices[0].text.strip() == expected("the lime is", 12, **steering)
        assert answer.usage.prompt_tokens == 4 and answer.usage.total_tokens == 4 + answer.usage.completion_tokens
        assert answer.choices[0].finish_reason == ("stop" if answer.usage.completion_tokens < 12 else "length")


def test_chats_use_the_template(client, expected):
    def chat(messages, **options):
        return client.chat.completions.create(
            model="tiny", messages=messages, temperature=0, extra_body={"steer": {"honest": 1.0}, **options}, **LIMIT
        )

    LIMIT = {"max_completion_tokens": 8}
    said = [{"role": "system", "content": "anna is honest"}, {"role": "user", "content": "the lime is a kind of"}]
    answer = chat(said)
    prompt = "system : anna is honest . user : the lime is a kind of . "
    assert answer.choices[0].message.content == expected(prompt, 8, is_chat=True, honest=1.0)
    assert answer.choices[0].message.role == "assistant"
    parts = [said[0], {"role": "user", "content": [{"type": "text", "text": "the lime is a kind of"}]}]
    assert chat(parts).choices[0].message.content == answer.choices[0].message.content
    loud = chat(said, chat_template_kwargs={"shout": True})
    assert loud.usage.prompt_tokens == answer.usage.prompt_tokens + 1
    for wrong in ({"chat_template": "x"}, {"tokenize": False}):
        with pytest.raises(openai.BadRequestError, match="itself sets"):
            chat(said, chat_template_kwargs=wrong)
    with pytest.raises(openai.BadRequestError, match="chat template refuses"):
        chat([{"role": "assistant", "content": "so"}])


def test_streams_give_the_same_text(client, expected):
    options = {"model": "tiny", "temperature": 0, "stream": True, "extra_body": {"steer": {"honest": -1.0}}}
    chunks = list(client.completions.create(prompt="the rain settles on", max_tokens=10, **options))
    assert len(chunks) > 3
    assert "".join(c.choices[0].text for c in chunks).strip() == expected("the rain settles on", 10, honest=-1.0)
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    messages = [{"role": "user", "content": "the lime is"}]
    with_usage = {"stream_options": {"include_usage": True}, "max_tokens": 5}
    chunks = list(client.chat.completions.create(messages=messages, **with_usage, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens <= 5 and not chunks[-1].choices
    text = "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
    assert text == expected("user : the lime is . ", 5, is_chat=True, honest=-1.0)


def test_log_probabilities_have_the_shape_of_openai(client):
    options = {"model": "tiny", "max_tokens": 4, "temperature": 0, "seed": 7}
    choice = client.completions.create(prompt="the lime is", logprobs=2, **options).choices[0]
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == 4
    assert [len(top) for top in choice.logprobs.top_logprobs] == [2] * 4
    assert all(logp <= 0 for logp in choice.logprobs.token_logprobs)
    assert [token.strip() for token in choice.logprobs.tokens] == choice.text.split()
    messages = [{"role": "user", "content": "the lime is"}]
    chat = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=3, **options).choices[0]
    told = chat.logprobs.content
    assert " ".join(one.token.strip() for one in told) == chat.message.content
    assert all(one.top_logprobs[0].logprob == one.logprob for one in told)
    chunks = list(client.chat.completions.create(messages=messages, logprobs=True, stream=True, **options))
    streamed = [
        one.token for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content
    ]
    assert streamed == [one.token for one in told]


def test_what_clients_write_out_is_taken(client, running):
    """Fields that are null, a prompt alone in a list, an answer as the client keeps it."""
    nulls = dict.fromkeys(["top_logprobs", "tool_choice", "metadata", "stop", "steer", "logit_bias"])
    plain = ask(running, "/v1/completions", {**GOOD, "temperature": 0})[1]["choices"]
    for prompt in (["the lime is"], [client_ids(running, "the lime is")], client_ids(running, "the lime is")):
        assert (
            ask(running, "/v1/completions", {**GOOD, **nulls, "prompt": prompt, "temperature": 0})[1]["choices"]
            == plain
        )
    said = [{"role": "user", "content": "the lime is"}]
    first = client.chat.completions.create(model="tiny", messages=said, max_tokens=3).choices[0].message
    again = [*said, first.model_dump(), {"role": "user", "content": "a fruit"}]
    assert client.chat.completions.create(model="tiny", messages=again, max_tokens=3).choices[0].message.content


def client_ids(running, text):
    return running[2](text)["input_ids"]


def test_a_special_token_ends_an_answer():
    """It never becomes text, so that no text of an answer holds it."""
    body = {**GOOD, "max_tokens": 8, "temperature": 0}
    with serving() as it:
        seen = ask(it, "/v1/completions", {**body, "logprobs": 0})[1]["choices"][0]
        third = seen["logprobs"]["tokens"][2]
        it[2].add_special_tokens({"additional_special_tokens": [third]})
        choice = ask(it, "/v1/completions", {**body, "stop": [third]})[1]["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["text"].split() == seen["text"].split()[:2]


def test_a_waiting_stream_whose_client_leaves_is_forgotten():
    with serving(Limits(max_concurrent=1)) as it:
        body = {"model": "tiny", "prompt": "the lime is", "max_tokens": 500, "temperature": 0, "stream": True}
        connections = [http.client.HTTPConnection("127.0.0.1", it[0], timeout=60) for _ in range(3)]
        for connection in connections:
            connection.request("POST", "/v1/completions", json.dumps(body))
        response = connections[0].getresponse()
        text = response.read(10)
        for connection in connections[1:]:
            connection.sock.close()
            connection.close()
        while it[3].running > 1:
            text += response.read(100)
        assert b"[DONE]" not in text  # the first one still runs, so that they were not just answered
        connections[0].sock.close()
        connections[0].close()
        assert idle(it)


def test_a_stop_text_ends_the_answer(client, running, expected):
    whole = expected("the lime is", 20)
    word = whole.split()[3]
    answer = client.completions.create(model="tiny", prompt="the lime is", max_tokens=20, temperature=0, stop=[word])
    assert answer.choices[0].text.strip() == whole[: whole.index(word)].strip()
    assert answer.choices[0].finish_reason == "stop"
    assert idle(running)


def idle(running):
    """Whether the server forgets all requests soon."""
    for _ in range(100):
        if running[3].running == 0:
            return True
        time.sleep(0.05)
    return False


def test_models_health_and_metrics(client, running):
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.steer == ["honest", "mood"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert ask(running, "/health") == (200, {"status": "ok"})
    before = counted(running)
    client.completions.create(model="tiny", prompt="the lime is", max_tokens=3, temperature=0)
    ask(running, "/v1/completions", {"model": "other", "prompt": ""})
    after = counted(running)
    assert after["repeng_prompt_tokens_total", ""] == before["repeng_prompt_tokens_total", ""] + 4
    assert after["repeng_requests_total", "200"] == before["repeng_requests_total", "200"] + 1
    assert after["repeng_requests_total", "404"] == before.get(("repeng_requests_total", "404"), 0) + 1
    assert idle(running) and counted(running)["repeng_running", ""] == 0


def counted(running):
    _, text = ask(running, "/metrics")
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, sample.labels.get("status", "")): sample.value for sample in samples}


GOOD = {"model": "tiny", "prompt": "the lime is", "max_tokens": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "the lime is"}], "max_tokens": 2}


@pytest.mark.parametrize(
    "body, field, status",
    [
        (b"", None, 400),
        (b"{", None, 400),
        (b"[1]", None, 400),
        ({**GOOD, "model": "other"}, "model", 404),
        ({"prompt": "a"}, "model", 400),
        ({"model": "tiny"}, "prompt", 400),
        ({**GOOD, "prompt": []}, "prompt", 400),
        ({**GOOD, "prompt": [10**9]}, "prompt", 400),
        ({**GOOD, "prompt": [-1]}, "prompt", 400),
        ({**GOOD, "prompt": ["a", "b"]}, None, 400),
        ({**GOOD, "prompt": [[5], [6]]}, None, 400),
        ({**GOOD, "prompt": [[]]}, "prompt", 400),
        ({**GOOD, "prompt": "the " * 300}, None, 400),
        ({**GOOD, "max_tokens": 0}, "max_tokens", 400),
        ({**GOOD, "max_tokens": 1000}, "max_tokens", 400),
        ({**GOOD, "max_tokens": True}, "max_tokens", 400),
        ({**GOOD, "max_tokens": "2"}, "max_tokens", 400),
        ({**GOOD, "temperature": -1}, "temperature", 400),
        (b'{"model": "tiny", "prompt": "the", "temperature": NaN}', "temperature", 400),
        ({**GOOD, "top_p": 0}, "top_p", 400),
        ({**GOOD, "seed": -1}, "seed", 400),
        ({**GOOD, "n": 2}, "n", 400),
        ({**GOOD, "logprobs": 21}, "logprobs", 400),
        ({**GOOD, "frequency_penalty": 0.5}, "frequency_penalty", 400),
        ({**GOOD, "stop": ""}, None, 400),
        ({**GOOD, "steer": {"honest": "1"}}, "steer.honest", 400),
        ({**GOOD, "steer": {"honst": 1}}, "steer", 400),
        ({**GOOD, "steer": {"honest": 11}}, "steer", 400),
        ({**GOOD, "steer": 1}, "steer", 400),
        ({**GOOD, "stream_options": {"include_usage": True}}, "stream_options", 400),
        ({**GOOD, "steering": {}}, "steering", 400),
        (b'{"model": "tiny", "prompt": "' + b"a" * (5 * 2**20) + b'"}', None, 413),
    ],
)
def test_what_is_wrong_is_said(running, body, field, status):
    given, answer = ask(running, "/v1/completions", body)
    assert given == status
    error = answer["error"]
    assert error["message"] and error["code"] == status
    assert field is None or error["param"] == field


@pytest.mark.parametrize(
    "change", [{"messages": []}, {"messages": [{"role": "robot", "content": "a"}]}, {"tools": [{}]}, {"store": True}]
)
def test_what_is_wrong_in_a_chat_is_said(running, change):
    assert ask(running, "/v1/chat/completions", {**CHAT, **change})[0] == 400
    assert ask(running, "/v1/chat/completions", {**CHAT, "n": 1, "presence_penalty": 0, "user": "me"})[0] == 200


def test_other_routes_and_hosts_are_refused(running):
    assert ask(running, "/v1/nothing")[0] == 404
    assert ask(running, "/v1/completions")[0] == 405
    assert ask(running, "/health", headers={"Host": "evil.example"})[0] == 400
    assert ask(running, "/v1/completions", GOOD, headers={"Origin": "https://evil.example"})[0] == 403
    assert ask(running, "/v1/completions", GOOD, headers={"Origin": "http://localhost:3000"})[0] == 200
    assert ask(running, "/v1/models/other")[0] == 404


def test_a_client_that_goes_away_ends_its_request(running):
    for stream in (True, False):
        connection = http.client.HTTPConnection("127.0.0.1", running[0], timeout=60)
        body = {"model": "tiny", "prompt": "the lime is", "max_tokens": 190, "temperature": 0, "stream": stream}
        connection.request("POST", "/v1/completions", json.dumps(body))
        if stream:
            connection.getresponse().read(10)
        for _ in range(200):
            if running[3].running == 1:
                break
            time.sleep(0.01)
        else:
            pytest.fail("the request does not run")
        connection.sock.close()
        connection.close()
        assert idle(running)


def test_a_key_is_asked_for_and_too_many_requests_are_told_to_wait():
    with serving(Limits(max_concurrent=1, max_waiting=1), api_key="secret") as it:
        for path in ("/v1/models", "/metrics"):
            assert ask(it, path)[0] == 401
            assert ask(it, path, headers={"Authorization": "Bearer wrong"})[0] == 401
            assert ask(it, path, headers={"Authorization": "Bearer secret"})[0] == 200
        assert ask(it, "/v1/completions", GOOD)[0] == 401
        assert ask(it, "/health")[0] == 200
        found = []
        body = {**GOOD, "max_tokens": 150}
        threads = [
            threading.Thread(
                target=lambda: found.append(
                    ask(it, "/v1/completions", body, headers={"Authorization": "Bearer secret"})[0]
                )
            )
            for _ in range(5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == [200, 200, 429, 429, 429]
