"""Requests that share a batch get what each would get alone."""

import asyncio
import random
from dataclasses import replace

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support import randomise
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from repeng import SteeringVector, SvdSteeringConfig, steer
from repeng.control.dials import Dials, load_dials
from repeng.serve.batching import Batching, Failed, Limits, Unavailable
from repeng.serve.names import named_paths
from repeng.serve.sampling import Sampler, Sampling

GREEDY = Sampling(temperature=0)
PROMPTS = [[5, 9, 13, 21], [7, 11], [30, 31, 32, 33, 34, 35, 36], [8, 8, 8], [40, 3]]


def llama(**changes):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**{**tiny_models.SIZES, "num_key_value_heads": 2, "eos_token_id": None, **changes})
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


KINDS = {
    "lora": LoraConfig(r=3, target_modules=["q_proj", "down_proj"]),
    "svd": SvdSteeringConfig(r=4, target_modules=["residual-writers", "up_proj"]),
    "residual": SvdSteeringConfig(r=4, target_modules="residual"),
    "bias": SvdSteeringConfig(target_modules="residual", rotate_input=False),
}


def dials_of(kind, **changes):
    """A model with an adapter `a` and a vector `v`, both strong."""
    model = llama(**changes)
    adapted = get_peft_model(model, KINDS[kind], adapter_name="own")
    randomise(adapted, 0.5)
    vector = SteeringVector({("residual", 1): torch.randn(tiny_models.WIDTH)})
    return Dials(model, {"a": "own"}, {"v": vector})


def alone(dials, ids, steering, n):
    """Greedy tokens of one text, by `generate` and `steer`."""
    row = torch.tensor([ids], device=dials.model.device)
    with dials.at(steering):
        options = {"max_new_tokens": n, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return dials.model.generate(row, attention_mask=torch.ones_like(row), **options)[0, len(ids) :].tolist()


async def answer(batching, ids, steering, n, sampling=GREEDY, wait=0.0):
    await asyncio.sleep(wait)
    found = []
    async for new in batching.generate(ids, steering, n, sampling):
        found += new.ids
    return found


def run(batching, *requests):
    """What comes of requests at once; an exception where one failed."""

    async def all_of_them():
        return await asyncio.gather(*(answer(batching, *request) for request in requests), return_exceptions=True)

    batching.start()
    try:
        return asyncio.run(all_of_them())
    finally:
        batching.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_every_request_has_its_own_coefficients(kind):
    dials = dials_of(kind)
    steering = [{"a": 1.0}, {}, {"a": -1.0, "v": 0.5}, {"v": -2.0}, {"a": 0.3}]
    expected = [alone(dials, ids, each, 9) for ids, each in zip(PROMPTS, steering, strict=True)]
    assert expected != [alone(dials, ids, {}, 9) for ids in PROMPTS]
    # Later requests join a batch that runs, and shorter ones leave it; one prompt is longer than a forward takes.
    long = [random.Random(1).randrange(3, 61) for _ in range(41)]
    requests = [(ids, each, 9, GREEDY, 0.02 * n) for n, (ids, each) in enumerate(zip(PROMPTS, steering, strict=True))]
    found = run(Batching(dials, Limits(max_concurrent=3)), *requests, (long, {"a": -0.7}, 3))
    assert found == [*expected, alone(dials, long, {"a": -0.7}, 3)]
    assert alone(dials, PROMPTS[0], steering[0], 9) == expected[0]  # the model is as it was


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_every_request_has_its_own_coefficients_on_a_gpu(kind):
    dials = dials_of(kind)
    dials.model.to("cuda")
    steering = [{"a": 1.0}, {}, {"a": -1.0, "v": 0.5}, {"v": -2.0}, {"a": 0.3}]
    expected = [alone(dials, ids, each, 9) for ids, each in zip(PROMPTS, steering, strict=True)]
    requests = [(ids, each, 9, GREEDY, 0.02 * n) for n, (ids, each) in enumerate(zip(PROMPTS, steering, strict=True))]
    assert run(Batching(dials, Limits(max_concurrent=3)), *requests) == expected


def test_no_request_reads_keys_and_values_of_another_coefficient():
    """A whole page of the cache is the same text, which transformers would share."""
    dials = dials_of("lora", max_position_embeddings=600)
    ids = [random.Random(2).randrange(3, 61) for _ in range(300)]
    requests = [(ids, {"a": c}, 6, GREEDY, 0.3 * n) for n, c in enumerate((1.0, 0.0, -1.0))]
    found = run(Batching(dials, Limits(max_concurrent=2)), *requests)
    assert found == [alone(dials, ids, steering, 6) for _, steering, *_ in requests]
    assert len({tuple(each) for each in found}) == 3


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3-text", "phi3", "gpt2"])
def test_architectures(name):
    model = tiny_models.build(name)
    vector = SteeringVector({("residual", 1): 3 * torch.randn(tiny_models.WIDTH)})
    dials = Dials(model, None, {"v": vector})
    steering = [{"v": 1.0}, {"v": -1.0}, {}]
    expected = [alone(dials, ids, each, 5) for ids, each in zip(PROMPTS[:3], steering, strict=True)]
    batching = Batching(dials)
    batching.ends = set()
    assert run(batching, *((ids, each, 5) for ids, each in zip(PROMPTS[:3], steering, strict=True))) == expected


def test_a_request_without_numbers_fails_and_the_server_lives():
    dials = dials_of("lora")
    requests = [(PROMPTS[0], {"v": 3e38}, 5), (PROMPTS[1], {"a": 1.0}, 5), (PROMPTS[2], {}, 5)]
    later = (PROMPTS[1], {"a": 1.0}, 5, GREEDY, 0.5)
    *found, after = run(Batching(dials, Limits(max_coefficient=3e38)), *requests, later)
    assert isinstance(found[0], Failed)
    # Those beside it may fail with it, since attention multiplies its numbers by zero; none is wrong.
    for one, request in zip(found[1:], requests[1:], strict=True):
        assert isinstance(one, Failed) or one == alone(dials, *request)
    assert after == alone(dials, *later[:3])


def test_a_closed_request_is_cancelled_and_forgotten():
    dials = dials_of("lora")
    batching, forwards = Batching(dials, Limits(max_concurrent=1)), []
    dials.model.model.register_forward_hook(lambda *_: forwards.append(1))

    async def leave_early():
        stream = batching.generate(PROMPTS[0], {"a": 1.0}, 100, GREEDY)
        await anext(stream)
        assert batching.running == 1
        await stream.aclose()
        assert batching.running == 0
        return await answer(batching, PROMPTS[1], {"a": -1.0}, 5)

    batching.start()
    try:
        found = asyncio.run(leave_early())
    finally:
        batching.stop()
    assert len(forwards) < 50  # of 100, if the second one had had to wait for the first one's end
    assert found == alone(dials, PROMPTS[1], {"a": -1.0}, 5)


def test_too_many_requests_are_refused_and_a_stopped_server_says_so():
    batching = Batching(dials_of("lora"), Limits(max_concurrent=1, max_waiting=1))
    found = run(batching, *((PROMPTS[0], {}, 4) for _ in range(4)))
    assert [type(each) for each in found] == [list, list, Unavailable, Unavailable]
    assert [type(each) for each in asyncio.run(gathered(batching))] == [Unavailable]


async def gathered(batching):
    return await asyncio.gather(answer(batching, [5], {}, 2), return_exceptions=True)


def test_sampling_follows_the_request():
    """At temperature 1 many tokens are drawn; among the best one, or under a tiny share, the greedy one."""
    dials = dials_of("lora")
    few = [Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(temperature=0), Sampling(temperature=1e-9)]
    few.append(Sampling(temperature=0, top_k=2**40))
    drawn = [Sampling(seed=3), Sampling(seed=3), Sampling(seed=4), Sampling()]
    found = run(Batching(dials), *((PROMPTS[0], {}, 6, one) for one in [*few, *drawn]))
    assert found[:5] == [alone(dials, PROMPTS[0], {}, 6)] * 5
    assert found[5] == found[6] and len({tuple(each) for each in found[5:]}) == 3


def test_log_probabilities_are_those_of_the_steered_model():
    dials = dials_of("lora")
    asked = [({"a": 1.0}, Sampling(seed=1, logprobs=3, temperature=0.7)), ({"v": 0.5}, Sampling(logprobs=0))]

    async def together(batching):
        async def whole(ids, steering, sampling):
            found = [new async for new in batching.generate(ids, steering, 5, sampling)]
            return [token for new in found for token in new.ids], [one for new in found for one in new.drawn]

        return await asyncio.gather(*(whole(PROMPTS[0], *each) for each in asked))

    batching = Batching(dials)
    batching.start()
    try:
        answers = asyncio.run(together(batching))
    finally:
        batching.stop()
    for (steering, sampling), (tokens, drawn) in zip(asked, answers, strict=True):
        with torch.no_grad(), dials.at(steering):
            logits = dials.model(torch.tensor([[*PROMPTS[0], *tokens]])).logits[0, len(PROMPTS[0]) - 1 : -1]
        expected = logits.log_softmax(-1)
        assert [one.token for one in drawn] == tokens
        for row, one in zip(expected, drawn, strict=True):
            assert one.logprob == pytest.approx(row[one.token].item(), abs=1e-3)
            top = row.topk(sampling.logprobs)
            assert [token for token, _ in one.top] == top.indices.tolist()
            assert [logp for _, logp in one.top] == pytest.approx(top.values.tolist(), abs=1e-3)


@pytest.mark.parametrize(
    "sampling, allowed",
    [(Sampling(), 6), (Sampling(temperature=0.5), 6), (Sampling(top_k=3), 3), (Sampling(top_p=0.7), 2)],
)
def test_draws_have_the_probabilities_that_are_asked_for(sampling, allowed):
    logits = torch.tensor([1.0, 3.0, 2.5, 0.0, -1.0, 0.5])
    probability = (logits / sampling.temperature).softmax(-1)
    keep = probability.argsort(descending=True)[:allowed]
    expected = torch.zeros(6).index_put((keep,), probability[keep] / probability[keep].sum())
    sampler = Sampler(replace(sampling, seed=0), torch.device("cpu"))
    drawn = torch.stack([sampler.noisy(logits).argmax() for _ in range(4000)])
    found = torch.bincount(drawn, minlength=6) / 4000
    assert (found - expected).abs().max() < 0.03
    assert not found[expected == 0].any()


def test_what_cannot_be_served_is_refused(tmp_path):
    model = llama()
    with pytest.raises(ValueError, match="positions"):
        Batching(Dials(model), Limits(max_length=129))
    with pytest.raises(ValueError, match="max_concurrent"):
        Limits(max_concurrent=0)
    with pytest.raises(ValueError, match=r"no adapter or vector 'w'"):
        Batching(Dials(model)).check({"w": 1.0})
    for c in (11.0, float("nan")):
        with pytest.raises(ValueError, match="allowed"):
            Batching(dials_of("lora")).check({"a": c})
    with pytest.raises(ValueError, match="finite"):
        Dials(model, None, {"v": SteeringVector({("residual", 1): torch.full((32,), torch.nan)})})
    broken = dials_of("lora").model
    next(p for name, p in broken.named_parameters() if ".own" in name).data[0] = torch.inf
    with pytest.raises(ValueError, match="finite"):
        Dials(broken, {"a": "own"})
    with pytest.raises(ValueError, match="32 wide"):
        Dials(model, None, {"v": SteeringVector({("residual", 1): torch.ones(7)})})
    with pytest.raises(ValueError, match="other"):
        Dials(model, {"other": "other"})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        named_paths([f"v={tmp_path}/nowhere"])
    with pytest.raises(ValueError, match="cannot name"):
        named_paths([f"a.b={tmp_path}"])
    (tmp_path / "lr=1").mkdir()
    assert named_paths([f"v={tmp_path}/lr=1", str(tmp_path)]) == {"v": tmp_path / "lr=1", tmp_path.name: tmp_path}
    buffers = dials_of("svd").model
    next(b for name, b in buffers.named_buffers() if "svd_steering_u" in name).fill_(torch.nan)
    with pytest.raises(ValueError, match="finite"):
        Dials(buffers, {"a": "own"})


@pytest.mark.parametrize("name", ["neox", "qwen2-moe"])
def test_a_model_that_does_not_work_is_refused_at_the_start(name):
    """One that continuous batching cannot run, and one with a module that sees tokens without their rows."""
    model, target = tiny_models.build("neox"), "query_key_value"
    if name == "qwen2-moe":
        sizes = {**tiny_models.SIZES, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
        widths = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
        model, target = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **widths)).eval(), "shared_expert.down_proj"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[target]), adapter_name="own")
    randomise(adapted, 0.1)
    batching = Batching(Dials(model, {"a": "own"}))
    with pytest.raises(ValueError, match="cannot be served"):
        batching.start()
    assert not batching.alive and "forward" not in vars(model)


def test_layers_of_several_kinds_have_room_in_a_small_cache():
    layers = (["sliding_attention"] * 5 + ["full_attention"]) * 5 + ["sliding_attention"] * 4
    config = Gemma3TextConfig(**{**tiny_models.GEMMA, "num_hidden_layers": len(layers), "layer_types": layers})
    dials = Dials(Gemma3ForCausalLM(config).eval())
    batching = Batching(dials, Limits(max_concurrent=1, max_length=128))
    batching.ends = set()
    assert run(batching, (PROMPTS[0], {}, 3)) == [alone(dials, PROMPTS[0], {}, 3)]


def test_stopping_is_told_to_those_who_wait():
    dials = dials_of("lora", max_position_embeddings=2000)
    batching = Batching(dials, Limits(max_concurrent=2))

    async def stopped():
        asked = [asyncio.create_task(answer(batching, PROMPTS[0], {"a": c}, 1900)) for c in (1.0, -1.0, 0.5)]
        while batching.running < 3:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(batching.stop)
        return await asyncio.gather(*asked, return_exceptions=True)

    batching.start()
    found = asyncio.run(stopped())
    assert [type(one) for one in found] == [Unavailable] * 3 and not batching.running


def test_several_adapters_and_vectors_are_loaded_and_act_together(tmp_path):
    for name, targets in (("lora", ["q_proj"]), ("second", ["down_proj"])):
        adapted = get_peft_model(llama(), LoraConfig(r=2, target_modules=targets))
        randomise(adapted, 0.5)
        adapted.save_pretrained(str(tmp_path / name))
    svd = get_peft_model(llama(), SvdSteeringConfig(r=2, target_modules=["q_proj"]))
    randomise(svd, 0.5)
    svd.save_pretrained(str(tmp_path / "svd"))
    SteeringVector({("residual", 1): torch.ones(tiny_models.WIDTH)}).save(tmp_path / "v.safetensors")
    paths = {"lora": tmp_path / "lora", "second": tmp_path / "second", "v": tmp_path / "v.safetensors"}
    dials = load_dials(llama(), paths)
    assert dials.names == ("lora", "second", "v")
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad(), dials.at({"lora": 0.5, "second": -1.0, "v": 2.0}):
        together = dials.model(ids).logits
    by_hand = llama()
    for name, c in (("lora", 0.5), ("second", -1.0)):
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        for key, a in tensors.items():
            if ".lora_A." in key:
                weight = by_hand.get_submodule(key.removeprefix("base_model.model.").split(".lora_A")[0]).weight
                weight.data += c * 4 * tensors[key.replace("lora_A", "lora_B")] @ a  # alpha / r = 8 / 2
    with torch.no_grad(), steer(by_hand, 2.0, vector=SteeringVector.load(paths["v"])):
        expected = by_hand(ids).logits
    assert torch.allclose(together, expected, atol=1e-4)
    with torch.no_grad(), dials.at({}):
        assert torch.equal(dials.model(ids).logits, llama()(ids).logits)
    assert not torch.allclose(together, llama()(ids).logits, atol=1e-2)
    # One kind of adapter around another, at the same site.
    both = load_dials(llama(), {"lora": tmp_path / "lora", "svd": tmp_path / "svd"})
    for name in both.names:
        single = load_dials(llama(), {name: tmp_path / name})
        with torch.no_grad(), both.at({name: -1.0}), single.at({name: -1.0}):
            found, expected = both.model(ids).logits, single.model(ids).logits
        assert torch.equal(found, expected) and not torch.allclose(found, llama()(ids).logits, atol=1e-2)


def test_positions_are_refused_in_continuous_batching():
    model = llama()
    vector = SteeringVector({("residual", 1): torch.ones(tiny_models.WIDTH)})
    kwargs = {"cu_seq_lens_q": torch.tensor([0, 2])}
    with steer(model, 1.0, vector=vector, positions="generated"), pytest.raises(ValueError, match="continuous"):
        model(torch.tensor([[5, 6]]), **kwargs)
