"""A thousand requests at once, some broken off, some malformed: none is wrong, and nothing grows."""

import http.client
import itertools
import json
import random
import resource
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import torch
from test_server import idle, model_with_dials, serving

from repeng.serve import Limits

pytestmark = pytest.mark.slow
PROMPTS = ("the lime is", "the rain settles on", "anna is honest . the lime is a kind of", "two plus three is")
STEERING = ({}, {"honest": 1.0}, {"honest": -1.0}, {"mood": 2.0}, {"honest": 0.5, "mood": -1.0})
MALFORMED = (b"", b"{", b"[]", b'{"model": "tiny"}', b'{"model": "tiny", "prompt": "a", "steer": {"x": 1}}', b"\xff")
LENGTHS = (3, 12, 40)


def alone(prompt, steering, n):
    """Greedy text of one request, by `generate` on a model of its own."""
    torch.manual_seed(0)
    dials, tokenizer = model_with_dials()
    ids = tokenizer(prompt, return_tensors="pt")
    with dials.at(steering):
        out = dials.model.generate(**ids, max_new_tokens=n, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(out, skip_special_tokens=True).strip()


def one_request(port, seed, expected):
    """What became of one random request: its kind, and whether the answer is right."""
    drawn = random.Random(seed)
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=300)) as connection:
        if drawn.random() < 0.15:
            connection.request("POST", "/v1/completions", drawn.choice(MALFORMED))
            return "malformed", connection.getresponse().status == 400
        key = drawn.choice(PROMPTS), drawn.randrange(len(STEERING)), drawn.choice(LENGTHS)
        prompt, which, n = key
        leaves, streams = drawn.random() < 0.2, drawn.random() < 0.5
        body = {"model": "tiny", "prompt": prompt, "max_tokens": n, "temperature": 0, "steer": STEERING[which]}
        connection.request("POST", "/v1/completions", json.dumps({**body, "stream": streams or leaves}))
        response = connection.getresponse()
        if leaves:
            response.read(drawn.randrange(1, 400))
            connection.sock.close()
            return "left", response.status == 200
        text = response.read().decode()
        if streams:
            events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
            answer = "".join(event["choices"][0]["text"] for event in events)
        else:
            answer = json.loads(text)["choices"][0]["text"]
        return "answered", answer.strip() == expected[key]


def test_a_thousand_mixed_requests():
    keys = list(itertools.product(PROMPTS, range(len(STEERING)), LENGTHS))
    expected = {key: alone(key[0], STEERING[key[1]], key[2]) for key in keys}
    assert len(set(expected.values())) > len(keys) / 2
    with serving(Limits(max_concurrent=8, max_waiting=1000)) as it, ThreadPoolExecutor(32) as pool:
        found, memory = [], []
        for start in range(0, 1000, 250):
            found += pool.map(lambda seed: one_request(it[0], seed, expected), range(start, start + 250))
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        assert idle(it)
    kinds = {kind: [right for name, right in found if name == kind] for kind in ("answered", "left", "malformed")}
    print({kind: (sum(right), len(right)) for kind, right in kinds.items()}, memory)
    assert len(found) == 1000 and all(len(right) > 50 for right in kinds.values())
    assert all(right for _, right in found)
    assert memory[-1] < 1.05 * memory[0]
