"""A gate: token-wise coefficients, by arithmetic and on the embedded model."""

import pytest
import torch

from repeng import Gate, SteeringVector, extract, fit_gate, steer, tiny
from repeng.data.pairs import ContrastPair
from repeng.model.sites import capture, site_modules
from repeng.vectors import gate as module

PLACE = ("residual", 2)


@pytest.fixture(scope="module")
def pairs():
    return tiny.pairs("mood", 48, seed=0)


@pytest.fixture(scope="module")
def vector(embedded, tokenizer, pairs):
    return extract(*embedded, pairs, layers=[2], held_out=0)


@pytest.fixture(scope="module")
def gate(embedded, vector, pairs):
    return fit_gate(*embedded, vector, pairs)


def states(model, ids, layer=2):
    with torch.no_grad(), capture(site_modules(model, [("residual", layer)])) as outputs:
        model(ids)
    return outputs[0]


def test_each_token_moves_by_its_factor(embedded, tokenizer, vector):
    model = embedded[0]
    ids = torch.tensor([tokenizer("the rain settles on the")["input_ids"]])
    before = states(model, ids)
    weight = torch.randn(before.shape[-1], generator=torch.Generator().manual_seed(0)) / 50
    gate = Gate({PLACE: (weight, torch.tensor(0.1))})
    with steer(model, -2.0, vector=vector, gate=gate):
        after = states(model, ids)
    factor = (before @ weight + 0.1).clamp(min=0)
    assert (factor == 0).any() and (factor > 0).any()
    assert torch.allclose(after - before, -2.0 * factor[..., None] * vector[PLACE], atol=1e-4)


def test_a_gate_that_is_open_changes_nothing(embedded, tokenizer, vector):
    model, ids = embedded[0], torch.tensor([tokenizer("the rain settles on the")["input_ids"]])
    open_gate = Gate({PLACE: (torch.zeros(vector[PLACE].numel()), torch.tensor(1.0))})
    with steer(model, 1.5, vector=vector):
        plain = states(model, ids)
    with steer(model, 1.5, vector=vector, gate=open_gate):
        assert torch.equal(states(model, ids), plain)
    with steer(model, torch.tensor([0.0, 1.5]), vector=vector, gate=open_gate):
        rows = states(model, ids.repeat(2, 1))
    assert torch.allclose(rows[1], plain[0], atol=1e-5) and torch.allclose(rows[0], states(model, ids)[0], atol=1e-5)


def test_the_ridge_finds_a_probe():
    generator = torch.Generator().manual_seed(0)
    hs, w = torch.randn(400, 6, generator=generator), torch.randn(6, generator=generator)
    weight, bias = module._ridge(hs, hs @ w + 5.0)
    assert torch.allclose(weight / weight.norm(), w / w.norm(), atol=1e-2)
    assert (hs @ weight + bias).clamp(min=0).mean().item() == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(ValueError, match="push along the vector"):
        module._ridge(hs, torch.full((400,), -1.0))


def test_a_fitted_gate_opens_where_the_personas_act(embedded, tokenizer, gate, pairs):
    """On suffixes of mood it is open, 1 in the mean; on the arithmetic of controls it is nearly shut."""
    model = embedded[0]

    def mean_factor(texts):
        factors = []
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            factors.append(gate.factor(PLACE, states(model, ids))[0, 1:, 0])
        return torch.cat(factors).mean().item()

    moody = mean_factor([pair.suffix for pair in pairs])
    sums = mean_factor([q.suffix for q in tiny.questions("mood", "held_out") if q.kind == "control"][:20])
    assert moody == pytest.approx(1.0, rel=0.1) and sums < 0.8 * moody


def test_a_gate_is_saved_and_loaded(gate, tmp_path):
    gate.save(tmp_path / "gate.safetensors")
    again = Gate.load(tmp_path / "gate.safetensors")
    assert again.probes.keys() == gate.probes.keys()
    assert all(torch.equal(a, b) for a, b in zip(again.probes[PLACE], gate.probes[PLACE], strict=True))
    with pytest.raises(FileNotFoundError):
        Gate.load(tmp_path / "none")
    (tmp_path / "text").write_text("no")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Gate.load(tmp_path / "text")
    Gate({PLACE: (torch.full((3,), torch.nan), torch.tensor(0.0))}).save(tmp_path / "nan")
    with pytest.raises(ValueError, match="holds NaN or infinite"):
        Gate.load(tmp_path / "nan")


def test_what_does_not_fit_is_refused(embedded, tokenizer, vector, gate, steered):
    model = embedded[0]
    other = SteeringVector({("residual", 1): vector[PLACE]})
    with (
        pytest.raises(ValueError, match=r"no probe at \[\('residual', 1\)\]"),
        steer(model, 1.0, vector=other, gate=gate),
    ):
        pass
    with pytest.raises(ValueError, match="gate go with a vector"), steer(steered, 1.0, gate=gate):
        pass
    with pytest.raises(ValueError, match="suffix"):
        fit_gate(*embedded, vector, [ContrastPair("a", "b")])
    with pytest.raises(ValueError, match="push along"):
        fit_gate(*embedded, -1e6 * vector, tiny.pairs("mood", 8, seed=0))
