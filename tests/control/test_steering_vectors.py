"""Vectors in action: operators, positions at every decode step, every way of generating, caches."""

import copy

import pytest
import tiny_models
import torch
from accelerate import dispatch_model
from peft import get_peft_model
from support import cache_name
from transformers import Cache, pipeline

from repeng import SteeringVector, SvdSteeringConfig, extract, steer, tiny
from repeng.control.operators import OPERATORS
from repeng.model.sites import capture, decoder_layers, edit_outputs, site_module
from repeng.model.tokens import encode, pad_rows

LAYER = 3
POSITIONS = ["all", "prompt", "generated", slice(2, 5), slice(-2, None), slice(None, -1), slice(1, None, 2)]


@pytest.fixture(scope="module")
def vector():
    generator = torch.Generator().manual_seed(0)
    return SteeringVector({("residual", LAYER): 5.0 * torch.randn(128, generator=generator)})


@pytest.fixture(scope="module")
def prompts(tokenizer):
    texts = ["the speaker is honest . the lime is a", "the rain settles on the", "two plus three is"]
    return [encode(tokenizer, "", text).ids for text in texts]


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def states(model, layer, **inputs):
    with capture([decoder_layers(model)[layer]]) as outputs, torch.no_grad():
        model(**inputs)
    return outputs[0]


@pytest.mark.parametrize("site", ["residual", "up_proj", "k_proj", "o_proj"])
@pytest.mark.parametrize("layer", [0, 5])
def test_a_site_moves_by_the_vector_and_nothing_before_it(base, batch, site, layer):
    module = site_module(base, layer, site)
    before = list(decoder_layers(base))[:layer]
    with capture([*before, module]) as clean, torch.no_grad():
        base(batch)
    vector = SteeringVector({(site, layer): torch.randn(clean[-1].shape[-1])})
    with steer(base, -1.5, vector=vector), capture([*before, module]) as moved, torch.no_grad():
        base(batch)
    assert all(torch.equal(a, b) for a, b in zip(moved[:-1], clean[:-1], strict=True))
    assert torch.allclose(moved[-1], clean[-1] - 1.5 * vector[site, layer], atol=1e-5)


def test_operators(base, batch, vector):
    v = vector["residual", LAYER]
    unit = v / v.norm()
    clean = states(base, LAYER, input_ids=batch)
    c = torch.tensor([1.0, 0.0, -2.0, 0.5])
    with steer(base, c, vector=vector, operator="ablate"):
        gone = states(base, LAYER, input_ids=batch)
    along = clean @ unit
    assert torch.allclose(gone @ unit, (1 - c)[:, None] * along, atol=1e-4)
    assert torch.allclose(gone + c[:, None, None] * along[..., None] * unit, clean, atol=1e-4)
    assert torch.equal(gone[1], clean[1])
    with steer(base, c, vector=vector, operator="rotate"):
        turned = states(base, LAYER, input_ids=batch)
    assert torch.allclose(turned.norm(dim=-1), clean.norm(dim=-1), rtol=1e-5)
    pointed = torch.nn.functional.normalize(clean + c[:, None, None] * v, dim=-1)
    assert torch.allclose(torch.nn.functional.normalize(turned, dim=-1), pointed, atol=1e-5)
    assert torch.equal(turned[1], clean[1])
    with steer(base, 1e4, vector=vector, clamp=1.25):
        clamped = states(base, LAYER, input_ids=batch)
    assert torch.allclose(clamped.norm(dim=-1), 1.25 * clean.norm(dim=-1), rtol=1e-5)
    with steer(base, 1e-4, vector=vector, clamp=1.25):
        free = states(base, LAYER, input_ids=batch)
    assert torch.allclose(free, clean + 1e-4 * v, atol=1e-5)


def expected_tokens(positions, mask, prompt_columns, row):
    """Which columns of a row are steered, spelt out token by token."""
    columns = mask.shape[1]
    real = [column for column in range(columns) if mask[row, column]]
    prompt = [column for column in real if column < prompt_columns]
    match positions:
        case "all":
            chosen = real
        case "prompt":
            chosen = prompt
        case "generated":
            chosen = [column for column in real if column >= prompt_columns]
        case _:
            start, stop = positions.start, positions.stop
            start = 0 if start is None else start if start >= 0 else max(len(prompt) + start, 0)
            stop = len(real) if stop is None else stop if stop >= 0 else len(prompt) + stop
            chosen = real[start : stop : positions.step]
    return [column in chosen for column in range(columns)]


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize("use_cache", [True, False])
def test_every_decode_step_steers_the_right_tokens(base, tokenizer, prompts, vector, positions, use_cache):
    """Logits of generation are those of one forward over the whole text with the edit made by hand."""
    batch = pad_rows(prompts, tokenizer, side="left")
    batch.pop("position_ids")
    columns = batch["input_ids"].shape[1]
    settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with steer(base, 1.5, vector=vector, positions=positions):
        out = base.generate(**batch, **settings, use_cache=use_cache, eos_token_id=None)
    text = out.sequences[:, :-1]
    mask = torch.cat([batch["attention_mask"], torch.ones(3, text.shape[1] - columns, dtype=torch.long)], dim=1)
    chosen = torch.tensor([expected_tokens(positions, mask, columns, row) for row in range(3)])
    assert chosen.any()
    shift = 1.5 * chosen[..., None] * vector["residual", LAYER]
    place = {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0), "attention_mask": mask}
    with edit_outputs([(decoder_layers(base)[LAYER], lambda h: h + shift)]):
        whole = logits(base, input_ids=text, **place)
    for step, found in enumerate(out.logits):
        assert torch.allclose(found, whole[:, columns - 1 + step], atol=1e-3), step
    assert (whole - logits(base, input_ids=text, **place)).abs().max() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_steered_and_a_batch_is_its_rows(base, tokenizer, prompts, vector, side):
    batch = pad_rows(prompts, tokenizer, side=side)
    clean = states(base, LAYER, **batch)
    coefficients = (1.0, -2.0, 0.5)
    with steer(base, torch.tensor(coefficients), vector=vector):
        moved, together = states(base, LAYER, **batch), logits(base, **batch)
    real = batch["attention_mask"].bool()
    assert torch.equal(moved[~real], clean[~real]) and not torch.equal(moved[real], clean[real])
    for row, c in enumerate(coefficients):
        with steer(base, c, vector=vector):
            alone = logits(base, input_ids=torch.tensor([prompts[row]]))
        assert torch.allclose(together[row, real[row]], alone[0], atol=1e-4)


def test_the_next_prompt_in_a_context_is_a_prompt_again(base, tokenizer, prompts, vector):
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    ids = [torch.tensor([prompt]) for prompt in prompts]
    for use_cache in (True, False):
        with steer(base, 2.0, vector=vector, positions="prompt"):
            together = [base.generate(input_ids=i, **settings, use_cache=use_cache) for i in (*ids, *ids)]
        for i, found in zip((*ids, *ids), together, strict=True):
            with steer(base, 2.0, vector=vector, positions="prompt"):
                assert torch.equal(base.generate(input_ids=i, **settings), found)


def test_a_second_turn_on_the_same_cache_is_a_prompt_of_its_own(base, prompts, vector):
    settings = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    for positions in ("prompt", "generated", slice(-2, None)):
        found = []
        for together in (True, False):
            with steer(base, 2.0, vector=vector, positions=positions):
                first = base.generate(input_ids=torch.tensor([prompts[0]]), max_new_tokens=3, **settings)
                text = torch.cat([first.sequences, torch.tensor([prompts[1]])], dim=1)
                cache = {cache_name(): next(v for v in first.values() if isinstance(v, Cache))}
                if together:
                    found.append(base.generate(input_ids=text, max_new_tokens=3, **cache, **settings).logits)
            if not together:
                with steer(base, 2.0, vector=vector, positions=positions):
                    found.append(base.generate(input_ids=text, max_new_tokens=3, **cache, **settings).logits)
        for a, b in zip(*found, strict=True):
            assert torch.allclose(a, b, atol=1e-4), positions


@pytest.mark.parametrize("positions", ["all", slice(0, 2), slice(-2, None)], ids=str)
@pytest.mark.parametrize("how", [{"cache_implementation": "static"}, {"prefill_chunk_size": 2}], ids=str)
def test_static_caches_and_prompts_in_chunks(base, tokenizer, prompts, vector, positions, how):
    batch = pad_rows(prompts, tokenizer, side="left")
    batch.pop("position_ids")
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    with steer(base, 1.5, vector=vector, positions=positions):
        plain, other = (base.generate(**batch, **settings, **more).logits for more in ({}, how))
    for a, b in zip(plain, other, strict=True):
        assert torch.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("positions", ["all", slice(0, 2), slice(-2, None)], ids=str)
def test_padding_is_seen_through_a_multimodal_wrapper(positions):
    model = tiny_models.build("gemma3-multimodal")
    ids = torch.randint(3, 59, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}
    clean = states(model, 1, **inputs)
    wide = SteeringVector({("residual", 1): torch.ones(tiny_models.WIDTH)})
    with steer(model, 5.0, vector=wide, positions=positions):
        moved = states(model, 1, **inputs)
    steered = (moved - clean).abs().amax(dim=-1) > 1
    wanted = [expected_tokens(positions, mask, 6, row) for row in (0, 1)]
    assert steered.tolist() == wanted
    with steer(model, 5.0, vector=wide, positions=positions):
        assert (states(model, 1, input_ids=ids)[1] - clean[1]).abs().amax(dim=-1).gt(1).tolist() == wanted[1]
        if isinstance(positions, slice):
            with pytest.raises(ValueError, match="does not tell padding"):
                model(input_ids=ids, attention_mask=torch.zeros(2, 1, 6, 6))


def test_a_zero_vector_does_nothing_with_any_operator(base, batch):
    clean, nothing = logits(base, input_ids=batch), SteeringVector({("residual", LAYER): torch.zeros(128)})
    for operator in OPERATORS:
        with steer(base, 1.0, vector=nothing, operator=operator):
            assert torch.allclose(logits(base, input_ids=batch), clean, atol=1e-4)


def test_beams_sampling_and_assistance(base, prompts, vector):
    ids = torch.tensor([prompts[1]] * 2)
    c = torch.tensor([4.0, -4.0])
    for settings in (
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 3},
    ):
        n = settings.get("num_return_sequences", 1)
        with steer(base, c, vector=vector):
            together = base.generate(input_ids=ids, max_new_tokens=6, **settings)
        for row in (0, 1):
            with steer(base, c[row], vector=vector):
                alone = base.generate(input_ids=ids[:1], max_new_tokens=6, **settings)
            assert torch.equal(together[n * row : n * row + n], alone), settings
        assert not torch.equal(together[:n], together[n:])
    helper = copy.deepcopy(base)
    for positions in ("all", "generated", slice(1, None, 2)):
        with steer(base, 4.0, vector=vector, positions=positions):
            plain = base.generate(input_ids=ids[:1], max_new_tokens=12, do_sample=False)
            assisted = base.generate(input_ids=ids[:1], max_new_tokens=12, do_sample=False, assistant_model=helper)
        assert torch.equal(plain, assisted)


def test_a_pipeline_is_steered(base, tokenizer, vector):
    generate = pipeline("text-generation", model=base, tokenizer=tokenizer)
    settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    plain = generate("the rain settles on", **settings)[0]["generated_text"]
    with steer(base, 6.0, vector=vector):
        steered = generate("the rain settles on", **settings)[0]["generated_text"]
        ids = base.generate(**tokenizer("the rain settles on", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert steered != plain and tokenizer.decode(ids[0], skip_special_tokens=True).endswith(steered.strip())
    assert generate("the rain settles on", **settings)[0]["generated_text"] == plain


def test_vectors_and_adapters_act_together(base, embedded, batch, vector):
    torch.manual_seed(0)
    config = SvdSteeringConfig(r=4, target_modules=["up_proj"], layers_to_transform=[1], init_weights=False)
    model = get_peft_model(base, config).eval()
    other = SteeringVector({("residual", LAYER): torch.ones(128)})
    with steer(model, -1.0):
        adapted = states(model, LAYER, input_ids=batch)
        with steer(model, 2.0, vector=vector), steer(model, 0.5, vector=other, positions=slice(0, 2)):
            together = states(model, LAYER, input_ids=batch)
        assert torch.equal(states(model, LAYER, input_ids=batch), adapted)
    first = torch.arange(batch.shape[1]) < 2
    wanted = adapted + 2.0 * vector["residual", LAYER] + 0.5 * first[:, None] * torch.ones(128)
    assert torch.allclose(together, wanted, atol=1e-5)
    with steer(model, 0.0), steer(model, 0.0, vector=vector):
        assert torch.equal(logits(model, input_ids=batch), logits(embedded[0], input_ids=batch))


def test_whatever_happens_nothing_stays(base, batch, vector):
    clean = logits(base, input_ids=batch)
    with pytest.raises(RuntimeError, match="inside"), steer(base, 1.0, vector=vector), steer(base, 2.0, vector=vector):
        raise RuntimeError("inside")
    with pytest.raises(ValueError, match=r"^3 coefficients.*row"), steer(base, torch.ones(3), vector=vector):
        logits(base, input_ids=batch)
    with pytest.raises(ValueError, match="max_new_tokens"), steer(base, 1.0, vector=vector):
        base.generate(input_ids=batch, max_new_tokens=-1)
    assert torch.equal(logits(base, input_ids=batch), clean)
    assert not any(m._forward_hooks or m._forward_pre_hooks or "generate" in vars(m) for m in base.modules())


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"operator": "multiply"}, ["'multiply'", "add, ablate, rotate"]),
        ({"positions": "first"}, ["'first'", "prompt"]),
        ({"positions": slice(0, 4, -1)}, ["positions", "-1"]),
        ({"clamp": 0.0}, ["clamp"]),
        ({"coefficient": float("inf")}, ["finite"]),
        ({"adapter_name": "x"}, ["nest two contexts"]),
        ({"vector": None, "operator": "rotate"}, ["go with a vector"]),
    ],
)
def test_bad_requests_are_refused(base, vector, settings, words):
    settings = {"coefficient": 1.0, "vector": vector, **settings}
    with pytest.raises(ValueError) as error, steer(base, **settings):
        pass
    for word in words:
        assert word in str(error.value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def prefill(model, ids):
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
    return next(value for value in out.values() if isinstance(value, Cache))


def go_on(model, cache, ids=((5,),)):
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(ids), **{cache_name(): copy.deepcopy(cache)}).logits


def test_a_cache_made_at_another_coefficient_raises(base, prompts, vector):
    ids = torch.tensor([prompts[0]])
    config = SvdSteeringConfig(r=4, target_modules=["v_proj"], init_weights=False)
    adapted = get_peft_model(copy.deepcopy(base), config).eval()
    settings = ({"operator": "rotate"}, {"clamp": 9.0}, {"positions": "prompt"})
    others = [{"vector": vector * 2}, *({"vector": vector, **more} for more in settings)]
    for model, here, changed in ((base, {"vector": vector}, others), (adapted, {}, [{"vector": vector}])):
        with steer(model, 0.5, **here):
            cache = prefill(model, ids)
            within = go_on(model, cache)
            with pytest.raises(ValueError, match=r"at 0\.5.*at 1\.0|at 0\.5.*without"), steer(model, 1.0, **here):
                go_on(model, cache)
        with steer(model, 0.5, **here):
            assert torch.equal(go_on(model, cache), within)
        for difference in changed:
            with pytest.raises(ValueError, match="key-value cache"), steer(model, 0.5, **difference):
                go_on(model, cache)
        with pytest.raises(ValueError, match="now runs with"), steer(model, 0.0, **here):
            go_on(model, cache)
        with steer(model, -1.0, **here, reuse_cache=True):
            assert not torch.allclose(go_on(model, cache), within, atol=1e-4)
    with steer(adapted, 0.5), steer(adapted, 1.0, vector=vector):
        both = prefill(adapted, ids)
    with steer(adapted, 1.0, vector=vector), steer(adapted, 0.5):
        go_on(adapted, both)
    plain = prefill(base, ids)
    with pytest.raises(ValueError, match="without steering"), steer(base, 1.0, vector=vector):
        go_on(base, plain)
    with steer(base, 0.0, vector=vector):
        go_on(base, plain)
    unset = prefill(adapted, ids)  # outside of any context an adapter stands at 1
    with steer(adapted, 1.0):
        go_on(adapted, unset)
    with pytest.raises(ValueError, match="key-value cache"), steer(adapted, torch.tensor([0.5])):
        go_on(adapted, unset)


def test_a_prefix_can_be_left_unsteered(base, prompts, vector):
    """reuse_cache: the prefix keeps the base model's keys and values, what follows is steered."""
    ids = torch.tensor([prompts[0]])
    cache = prefill(base, ids[:, :4])
    with steer(base, 2.0, vector=vector, reuse_cache=True):
        found = go_on(base, cache, ids[:, 4:])
    with steer(base, 2.0, vector=vector, positions=slice(4, None)):
        assert torch.allclose(found, logits(base, input_ids=ids)[:, 4:], atol=1e-4)


@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_every_architecture_is_steered_and_generates_alike_with_and_without_cache(name):
    model = tiny_models.build(name)
    ids = torch.randint(3, 59, (2, 7), generator=torch.Generator().manual_seed(0))
    vector = SteeringVector(
        {("residual", 1): torch.randn(tiny_models.WIDTH), ("residual", 2): torch.randn(tiny_models.WIDTH)}
    )
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": 60, "attention_mask": torch.ones_like(ids)}
    clean = logits(model, input_ids=ids)
    for positions in ("all", "generated", slice(-2, None)):
        with steer(model, torch.tensor([1.0, -1.0]), vector=vector, positions=positions):
            cached, plain = (model.generate(input_ids=ids, use_cache=use, **settings) for use in (True, False))
        assert torch.equal(cached, plain), positions
    with steer(model, torch.tensor([0.0, 1.0]), vector=vector):
        moved = logits(model, input_ids=ids)
    # All rows of a batch share the matrix products of routed experts, and some CPUs round those by their size.
    tolerance = 1e-5 if name in ("mixtral", "qwen3-moe") else 0.0
    assert torch.allclose(moved[0], clean[0], rtol=0, atol=tolerance)
    assert not torch.allclose(moved[1], clean[1], atol=1e-3)


def test_offloaded_models_are_extracted_and_steered(tmp_path, tokenizer):
    base = tiny_models.build("qwen3")
    base.resize_token_embeddings(len(tokenizer))
    plain = copy.deepcopy(base)
    devices = {f"model.layers.{i}": "disk" for i in range(3)}
    devices |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    offloaded = dispatch_model(base, devices, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    pairs = tiny.pairs("mood", 8, 0)
    ids = torch.tensor([[5, 6, 7]])
    for method in ("mean_diff", "weight_svd"):
        options = {"k": 4} if method == "weight_svd" else {}
        vectors = [
            extract(m, tokenizer, pairs, layers=[1], method=method, held_out=0, **options) for m in (offloaded, plain)
        ]
        assert torch.allclose(vectors[0]["residual", 1], vectors[1]["residual", 1], atol=1e-5)
    with steer(offloaded, 3.0, vector=vectors[0]), steer(plain, 3.0, vector=vectors[0]):
        assert torch.allclose(logits(offloaded, input_ids=ids), logits(plain, input_ids=ids), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(embedded, batch, vector, dtype):
    half = copy.deepcopy(embedded[0]).to(dtype)
    clean = states(half, LAYER, input_ids=batch)
    with steer(half, torch.tensor([1.0, 0.0, -1.0, 2.0]), vector=vector):
        moved = states(half, LAYER, input_ids=batch)
    assert moved.dtype == dtype and torch.equal(moved[1], clean[1])
    for row, c in ((0, 1.0), (2, -1.0)):
        wanted = clean[row].float() + c * vector["residual", LAYER]
        assert torch.allclose(moved[row].float(), wanted.to(dtype).float(), rtol=0.01)
