"""Directions equal those computed by hand; one pass, no more than is needed; doubts are spoken."""

import contextlib
import copy
import sys

import numpy as np
import pytest
import tiny_models
import torch

from repeng import ContrastPair, extract, steer, tiny
from repeng.model.activations import fisher_noise, gradients, hidden_states, persona_loss, token_weights
from repeng.model.sites import capture, decoder_layers, site_module
from repeng.model.tokens import encode, pad_rows
from repeng.vectors.directions import METHODS, fisher, pca_center, pca_diff, svd, weight_svd

SITES = ("residual", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")


@pytest.fixture(scope="module")
def pairs():
    return tiny.pairs("honesty", 24, 0)


@pytest.fixture(scope="module")
def rows(pairs, embedded):
    return [[encode(embedded[1], side, p.suffix).ids for side in (p.chosen, p.rejected)] for p in pairs]


def one_by_one(model, ids, modules):
    """Outputs of the last token of one prompt, without batch or padding."""
    with capture(modules) as outputs, torch.no_grad():
        model(torch.tensor([ids]))
    return [output[0, -1] for output in outputs]


@pytest.mark.filterwarnings("ignore:held-out accuracy below:UserWarning")
def test_the_mean_difference_is_that_of_single_prompts_at_every_site_and_layer(embedded, pairs, rows):
    model, tokenizer = embedded
    vector = extract(model, tokenizer, pairs, sites=SITES, layers=[1, 4, 5])
    assert set(vector.directions) == {(site, layer) for site in SITES for layer in (1, 4, 5)}
    places = list(vector.directions)
    modules = [site_module(model, layer, site) for site, layer in places]
    sides = [[one_by_one(model, row[side], modules) for row in rows] for side in (0, 1)]
    for index, place in enumerate(places):
        chosen, rejected = (torch.stack([outputs[index] for outputs in side]) for side in sides)
        assert torch.allclose(vector.directions[place], (chosen - rejected).mean(dim=0), atol=1e-5), place


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_padding_and_batches_change_nothing(embedded, pairs, side, batch_size):
    model, tokenizer = embedded
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    settings = {"layers": [2, 5], "tokens": 3}
    expected = extract(model, embedded[1], pairs, **settings)
    found = extract(model, tokenizer, pairs, **settings, batch_size=batch_size)
    for place, direction in found.directions.items():
        assert torch.allclose(direction, expected.directions[place], atol=1e-5)


def test_which_tokens_are_read():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0]])
    third, half = 1 / 3, 0.5
    assert token_weights(mask, "last").tolist() == [[0, 0, 0, 0, 1], [0, 0, 0, 1, 0], [1, 0, 0, 0, 0]]
    assert token_weights(mask, 2).tolist() == [[0, 0, 0, half, half], [0, 0, half, half, 0], [1, 0, 0, 0, 0]]
    expected = [[0, 0, third, third, third], [0.25, 0.25, 0.25, 0.25, 0], [1, 0, 0, 0, 0]]
    assert torch.allclose(token_weights(mask, "mean"), torch.tensor(expected))
    for bad in (0, -1, "first", 1.5):
        with pytest.raises(ValueError, match="tokens must be"):
            token_weights(mask, bad)


def test_a_mean_over_tokens_is_that_of_the_states(embedded, rows):
    model, tokenizer = embedded
    ids = [row[0] for row in rows[:5]]
    module = decoder_layers(model)[2]
    for tokens, span in (("mean", slice(None)), (2, slice(-2, None))):
        found = hidden_states(model, tokenizer, ids, [("residual", 2)], tokens=tokens)["residual", 2]
        for row, state in zip(ids, found, strict=True):
            with capture([module]) as outputs, torch.no_grad():
                model(torch.tensor([row]))
            assert torch.allclose(state, outputs[0][0, span].mean(dim=0), atol=1e-5)


@pytest.mark.parametrize("tokens", ["last", "mean", 2])
def test_what_rows_begin_with_together_is_computed_once(embedded, tokenizer, tokens, monkeypatch):
    """More than one packed row, of prompts of which each two have a beginning in common."""
    model = embedded[0]
    words = [f"the speaker is honest . {text}" for text in tiny.neutral_texts(40, seed=0)]
    ids = [encode(tokenizer, text).ids for text in (*words, *(text[:-9] for text in words))]
    monkeypatch.setattr("repeng.model.activations.SAVED", 0)
    read, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: read.append(k["input_ids"]) or forward(*a, **k))
    packed = hidden_states(model, tokenizer, ids, [("residual", 2)], tokens=tokens)["residual", 2]
    assert read[-1].shape[0] == 1 and sum(part.numel() for part in read) < 0.6 * sum(map(len, ids))
    monkeypatch.setattr("repeng.model.activations.packing_for", lambda *_: None)
    read.clear()
    padded = hidden_states(model, tokenizer, ids, [("residual", 2)], tokens=tokens)["residual", 2]
    assert sum(map(len, read)) == len(ids) and torch.allclose(packed, padded, atol=1e-5)


def count_calls(model, monkeypatch):
    calls = {"layers": 0, "head": 0}
    for name, modules in (("layers", decoder_layers(model)), ("head", [model.lm_head])):
        for module in modules:
            forward = module.forward

            def counting(*args, _forward=forward, _name=name, **kwargs):
                calls[_name] += 1
                return _forward(*args, **kwargs)

            monkeypatch.setattr(module, "forward", counting)
    return calls


@pytest.mark.parametrize("layers, ran", [([0, 2], 3), ([5], 6), (None, 6)])
def test_nothing_behind_the_deepest_layer_runs(base, tokenizer, pairs, monkeypatch, layers, ran):
    calls = count_calls(base, monkeypatch)
    with pytest.warns(UserWarning, match="left out") if layers != [5] else contextlib.nullcontext():
        extract(base, tokenizer, pairs, sites=["residual", "up_proj", "k_proj"], layers=layers)
    assert calls == {"layers": ran * 2, "head": 0}  # 48 prompts are two batches


def test_the_model_is_left_as_it_was(base, tokenizer, pairs):
    base.train()
    base.model.layers[1].eval()
    base.requires_grad_(True)
    base.lm_head.requires_grad_(False)
    before = [module.training for module in base.modules()]
    for method in ("mean_diff", "fisher"):
        extract(base, tokenizer, pairs, layers=[3], method=method)
    assert [module.training for module in base.modules()] == before
    assert all(p.requires_grad == ("lm_head" not in n) and p.grad is None for n, p in base.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def test_dropout_is_off(pairs, tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).train()
    first, second = (extract(model, tokenizer, pairs, layers=[1]) for _ in range(2))
    assert first == second


def centred(rows):
    return rows - rows.mean(axis=0)


def numpy_top(rows):
    return np.linalg.svd(rows, full_matrices=False)[2][0]


def cosine(a, b):
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return (a @ b / a.norm() / b.norm()).item()


def test_principal_components_are_those_of_numpy(embedded, rows):
    model, tokenizer = embedded
    place = ("residual", 3)
    chosen, rejected = (hidden_states(model, tokenizer, [r[i] for r in rows], [place])[place] for i in (0, 1))
    dhs = (chosen - rejected).double().numpy()
    for function, direction in (
        (pca_diff, numpy_top(centred(dhs))),
        (pca_center, numpy_top(centred(np.concatenate([dhs / 2, -dhs / 2])))),
        (svd, numpy_top(dhs)),
    ):
        found = function(chosen, rejected)
        assert abs(cosine(found, direction)) > 0.9999, function.__name__
        assert ((chosen - rejected) @ found).mean() > 0


def planted(seed=0):
    """Pairs that agree along axis 0 and scatter widely along axis 1."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(200, 6, generator=generator) * torch.tensor([0.1, 5.0, 0.1, 0.1, 0.1, 0.1])
    rejected = torch.randn(200, 6, generator=generator)
    return rejected + noise + torch.tensor([1.0, 0, 0, 0, 0, 0]), rejected


def test_whitening_weighs_agreement():
    chosen, rejected = planted()
    axis = torch.eye(6)[0]
    assert abs(cosine(svd(chosen, rejected, k=1), axis)) < 0.2
    assert cosine(svd(chosen, rejected, k=2, whiten=True), axis) > 0.99
    full = svd(chosen, rejected, k=6)
    assert torch.allclose(full, (chosen - rejected).mean(dim=0), atol=1e-5)


def test_weight_svd_keeps_the_directions_along_which_the_sides_differ():
    chosen, rejected = planted()
    basis = torch.linalg.qr(torch.randn(6, 4, generator=torch.Generator().manual_seed(1))).Q
    mean = (chosen - rejected).mean(dim=0)
    along = basis.T @ mean
    kept = along.abs().topk(2).indices
    assert torch.allclose(weight_svd(chosen, rejected, basis, k=2), basis[:, kept] @ along[kept], atol=1e-6)
    assert torch.allclose(weight_svd(chosen, rejected, basis, k=4), basis @ along, atol=1e-6)


@pytest.mark.parametrize("site", ["residual", "up_proj"])
def test_gradients_are_those_of_finite_differences(embedded, rows, site):
    """Shifting the last token's activation by ε against the gradient changes the loss by ε‖gradient‖."""
    model, tokenizer = embedded
    place, some = (site, 2), [(r[0], r[1]) for r in rows[:4]]
    found = gradients(model, tokenizer, some, [place], batch_size=3)
    module = site_module(model, 2, site)

    def loss(pair, side, shift):
        logits = []
        for index, ids in enumerate(pair):
            with torch.no_grad(), moved(module, shift if index == side else 0 * shift):
                logits.append(model(torch.tensor([ids])).logits[:, -1].double())
        # Of each divergence only its second argument moves.
        logp, logq = (x.log_softmax(-1) for x in logits)
        fixed = [model(torch.tensor([ids])).logits[:, -1].double().log_softmax(-1).detach() for ids in pair]
        first = (fixed[0].exp() * (fixed[0] - logq)).sum()
        second = (fixed[1].exp() * (fixed[1] - logp)).sum()
        return (first - second).item()

    for row, pair in enumerate(some):
        for side in (0, 1):
            descent = found.descent[place][side * len(some) + row]
            step = 1e-2 * descent / descent.norm()
            change = (loss(pair, side, step) - loss(pair, side, -step)) / 2e-2
            assert change == pytest.approx(-descent.norm().item(), rel=0.05, abs=1e-4)


def moved(module, shift):
    from repeng.model.sites import edit_outputs

    def edit(output):
        return torch.cat([output[:, :-1], output[:, -1:] + shift], dim=1)

    return edit_outputs([(module, edit)])


BAD_LOSSES = {
    "a mean": lambda c, r: (c - r).mean(),
    "a row for each word": lambda c, r: c - r,
    "no gradient": lambda c, r: (c - r).sum(-1).detach(),
    "nothing": lambda c, r: None,
}


@pytest.mark.parametrize("loss", BAD_LOSSES.values(), ids=BAD_LOSSES)
def test_a_loss_must_be_one_value_for_each_pair(embedded, pairs, loss):
    with pytest.raises(ValueError, match="one value with gradient per pair"):
        extract(*embedded, pairs, layers=[3], method="gradient", loss=loss)


def test_a_loss_without_slope_gives_no_direction(embedded, pairs):
    with pytest.raises(ValueError, match="no gradient"):
        extract(*embedded, pairs, layers=[3], method="gradient", loss=lambda c, r: (c - r - 1e4).relu().sum(-1))


def test_the_batch_size_is_that_of_every_pass_and_no_grad_is_no_matter(base, tokenizer, pairs):
    sizes = []
    base.model.register_forward_pre_hook(lambda _m, _a, k: sizes.append(len(k["input_ids"])), with_kwargs=True)
    settings = {"layers": [3], "method": "gradient", "batch_size": 4}
    with torch.inference_mode():
        frozen = extract(base, tokenizer, pairs, **settings)
    assert set(sizes) == {4}
    assert extract(base, tokenizer, pairs, **settings) == frozen


def test_gpt2_sites_of_one_name_are_told_apart(tokenizer):
    model = tiny_models.build("gpt2")
    model.resize_token_embeddings(len(tokenizer))
    with pytest.raises(ValueError, match=r"matches 2 modules.*attn\.c_proj.*mlp\.c_proj"):
        site_module(model, 1, "c_proj")
    vector = extract(model, tokenizer, tiny.pairs("mood", 8, 0), sites="attn.c_proj", layers=np.int64(1), held_out=0)
    assert list(vector.directions) == [("attn.c_proj", 1)]


def test_the_default_loss_pulls_the_sides_the_right_way():
    chosen = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
    rejected = torch.tensor([[0.0, 2.0, 0.0]], requires_grad=True)
    down = [-g for g in torch.autograd.grad(persona_loss(chosen, rejected).sum(), (chosen, rejected))]
    assert down[1][0, 0] > 0 > down[1][0, 1]  # rejected toward what chosen says
    assert down[0][0, 0] > 0 > down[0][0, 1]  # chosen away from what rejected says


def test_the_natural_gradient_solves_the_damped_system():
    generator = torch.Generator().manual_seed(0)
    scores, descent = torch.randn(10, 6, generator=generator), torch.randn(10, 6, generator=generator)
    found = fisher(descent, 0 * descent, descent, scores, damping=0.3)
    information = scores.double().T @ scores.double() / 10
    damping = 0.3 * information.diag().mean()
    expected = torch.linalg.solve(information + damping * torch.eye(6), descent.double().mean(dim=0))
    assert torch.allclose(found.double(), expected, rtol=1e-3)


def test_scores_are_what_the_logits_turn_their_noise_into(embedded, rows):
    model, tokenizer = embedded
    place, pair = ("residual", 4), (rows[0][0], rows[0][1])
    scores = gradients(model, tokenizer, [pair], [place], seed=5).scores[place]
    module = site_module(model, 4, "residual")
    with torch.no_grad():
        logits = model(**pad_rows(pair, tokenizer, side="left")).logits[:, -1]
    noise = fisher_noise(logits, torch.Generator().manual_seed(5)).double()
    for side, ids in enumerate(pair):

        def read(shift, ids=ids, noise=noise[side]):
            with torch.no_grad(), moved(module, shift):
                return (model(torch.tensor([ids])).logits[0, -1].double() @ noise).item()

        step = 0.03 * scores[side] / scores[side].norm()
        assert (read(step) - read(-step)) / 0.06 == pytest.approx(scores[side].norm().item(), rel=0.05, abs=1e-4)


def test_the_noise_has_the_covariance_of_the_fisher_matrix():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0]).repeat(40_000, 1)
    noise, p = fisher_noise(logits, torch.Generator().manual_seed(0)), logits[0].softmax(dim=-1)
    assert torch.allclose(noise.T @ noise / len(noise), p.diag() - torch.outer(p, p), atol=5e-3)


@pytest.mark.filterwarnings("ignore:held-out accuracy below:UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_points_toward_chosen_and_tells_held_out_pairs_apart(embedded, method):
    model, tokenizer = embedded
    vector = extract(model, tokenizer, tiny.pairs("honesty", 96, 1), layers=[3, 4], method=method)
    mean = extract(model, tokenizer, tiny.pairs("honesty", 96, 1), layers=[3, 4])
    assert vector.metadata["method"] == method
    for place, direction in vector.directions.items():
        assert direction.norm().item() == pytest.approx(mean.directions[place].norm().item(), rel=1e-4)
    question = next(q for q in tiny.questions("honesty", "held_out") if q.kind == "target")
    ids = [encode(tokenizer, question.prompt, question.suffix).ids]
    answers = [tokenizer.convert_tokens_to_ids(list(words)) for words in (question.target, question.choices)]

    def share(c):
        with steer(model, c, vector=vector.select(layers=[4])), torch.no_grad():
            p = model(**pad_rows(ids, tokenizer)).logits[0, -1].softmax(dim=-1)
        return (p[answers[0]].sum() / p[answers[1]].sum()).item()

    if method != "pca_diff":  # which looks for where pairs differ from one another
        assert vector.metadata["accuracy"]["4.residual"] >= 0.9
        assert share(1.0) > share(0.0) + 1e-3 and share(-1.0) < share(0.0) - 1e-3


def test_swapped_sides_turn_every_direction_around(embedded, pairs):
    model, tokenizer = embedded
    swapped = [ContrastPair(p.rejected, p.chosen, p.suffix) for p in pairs]
    for method in METHODS:
        one, other = (extract(model, tokenizer, p, layers=[3], method=method, held_out=0) for p in (pairs, swapped))
        # What fisher draws follows the rows.
        assert cosine(one["residual", 3], -other["residual", 3]) > (0.8 if method == "fisher" else 0.9999), method


def test_a_coin_toss_is_warned_of(embedded, pairs):
    model, tokenizer = embedded
    mixed = [
        p if i % 2 else ContrastPair(p.rejected, p.chosen, p.suffix)
        for i, p in enumerate(tiny.pairs("honesty", 80, 0))
    ]
    with pytest.warns(UserWarning, match=r"held-out accuracy below 60%.*swapped"):
        extract(model, tokenizer, mixed, layers=[4])


def test_the_accuracy_is_of_pairs_that_the_direction_has_not_seen():
    """More dimensions than pairs, random sides: every seen pair is on the right side, unseen ones by chance."""
    from repeng.vectors.extract import fitter, split

    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(40, 500, generator=generator), torch.randn(40, 500, generator=generator)
    kept, out = split(40, 0.5, 0)
    assert sorted([*kept.tolist(), *out.tolist()]) == list(range(40)) and len(out) == 20
    fit = fitter(METHODS["mean_diff"], chosen, rejected, {}, {})
    along = (chosen - rejected) @ fit(kept)
    assert (along[kept] > 0).float().mean() == 1 and (along[out] > 0).float().mean() < 0.8


def test_extract_measures_the_accuracy_on_held_out_pairs(embedded, monkeypatch):
    """States drawn at random: what is measured on the pairs themselves would be near 1."""
    model, tokenizer = embedded
    generator = torch.Generator().manual_seed(0)

    def drawn(_model, _tokenizer, rows, places, **_):
        return {place: torch.randn(len(rows), 2000, generator=generator) for place in places}

    monkeypatch.setattr(sys.modules["repeng.vectors.extract"], "hidden_states", drawn)
    with pytest.warns(UserWarning, match="below 60%"):
        vector = extract(model, tokenizer, tiny.pairs("honesty", 80, 0), layers=[2, 3, 4], held_out=0.5)
    assert all(share < 0.8 for share in vector.metadata["accuracy"].values())


def test_places_that_do_not_see_the_persona_are_left_out_or_refused(embedded, pairs):
    model, tokenizer = embedded
    with pytest.warns(UserWarning, match="up_proj of layer 0|k_proj of layer 0"):
        vector = extract(model, tokenizer, pairs, sites=["k_proj", "residual"], layers=[0, 3])
    assert ("k_proj", 0) not in vector.directions and ("k_proj", 3) in vector.directions
    with pytest.raises(ValueError, match=r"same hidden states.*k_proj of layer 0"):
        extract(model, tokenizer, pairs, sites=["k_proj"], layers=[0])


def test_what_was_read_is_told(embedded, pairs):
    model, tokenizer = embedded
    vector = extract(model, tokenizer, pairs, layers=[3], tokens=2)
    assert len(vector.metadata["read"]) == 3
    for shown, pair in zip(vector.metadata["read"], pairs, strict=False):
        assert shown["chosen"].split() == shown["rejected"].split() == pair.suffix.split()[-2:]
        assert shown["chosen"] in vector.describe()


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"method": "mean_dif"}, ["mean_dif", "did you mean 'mean_diff'"]),
        ({"sites": ["up_prj"]}, ["up_prj", "up_proj"]),
        ({"sites": ["self_attn"]}, ["self_attn", "linear"]),
        ({"layers": [9]}, ["layer 9", "0 to 5"]),
        ({"method": "svd", "kk": 2}, ["'kk'", "k, whiten"]),
        ({"method": "mean_diff", "k": 2}, ["'k'", "no options"]),
        ({"method": "svd", "k": 500}, ["k must be from 1 to"]),
        ({"method": "fisher", "damping": 0}, ["damping"]),
        ({"held_out": 1.0}, ["held_out"]),
        ({"tokens": "first"}, ["tokens"]),
        ({"pairs": []}, ["0 pairs"]),
    ],
)
def test_bad_requests_are_refused(embedded, pairs, settings, words):
    model, tokenizer = embedded
    settings = {"pairs": pairs, "layers": [3], **settings}
    with pytest.raises(ValueError) as error:
        extract(model, tokenizer, settings.pop("pairs"), **settings)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_every_architecture_gives_vectors(name, tokenizer):
    model = tiny_models.build(name)
    model.resize_token_embeddings(len(tokenizer))
    pairs = tiny.pairs("mood", 8, 0)
    linear = tiny_models.ARCHITECTURES[name].linear[0]
    for method in ("mean_diff", "weight_svd", "fisher"):
        options = {"k": 4} if method == "weight_svd" else {}
        vector = extract(
            model, tokenizer, pairs, sites=["residual", linear], layers=[2], method=method, held_out=0, **options
        )
        assert all(direction.isfinite().all() for direction in vector.directions.values())
        vector.check(model)
