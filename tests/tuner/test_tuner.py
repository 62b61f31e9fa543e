"""The PEFT method: exact at 0, correct per row, strict and SVD-free when loaded."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, OFTConfig, PeftConfig, PeftModel, PsoftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from repeng import SvdSteeringConfig, steer, tiny
from repeng.tuner import SvdSteeringLayer
from repeng.tuner import layer as layer_module
from repeng.tuner.base import dense_weight
from repeng.tuner.coefficients import repeat_rows
from repeng.tuner.layer import Linear
from repeng.tuner.rotation import Rotations, rotation
from repeng.tuner.svd import top_singular_triples
from repeng.tuner.targets import writers


def logits(model, batch):
    with torch.no_grad():
        return model(batch).logits


def test_zero_and_disabled_are_bit_equal_to_the_base(embedded, steered, batch):
    expected = logits(embedded[0], batch)
    with steer(steered, 1.0):
        assert (logits(steered, batch) - expected).abs().max() > 0.05
    with steer(steered, 0.0):
        assert torch.equal(logits(steered, batch), expected)
    with steer(steered, torch.zeros(len(batch))):
        assert torch.equal(logits(steered, batch), expected)
    with steered.disable_adapter(), steer(steered, 1.0):
        assert torch.equal(logits(steered, batch), expected)


def test_fresh_adapter_is_the_base_at_every_coefficient(embedded, base, batch):
    model = get_peft_model(base, SvdSteeringConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with steer(model, -2.0):
        assert torch.allclose(logits(model, batch), logits(embedded[0], batch), atol=1e-5)


def test_each_row_follows_its_own_coefficient(embedded, steered, batch):
    coefficients = torch.tensor([1.0, 0.0, -0.5, 1.0])
    with steer(steered, coefficients):
        together = logits(steered, batch)
    for row, c in enumerate(coefficients):
        with steer(steered, c):
            assert torch.allclose(together[row], logits(steered, batch[row : row + 1])[0], atol=1e-4)
    assert torch.equal(together[1], logits(embedded[0], batch)[1])


def test_rows_of_beams_take_the_coefficient_of_their_prompt(steered, batch):
    arguments = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    same, coefficients = batch[:1].repeat(2, 1), (20.0, -20.0)
    with steer(steered, torch.tensor(coefficients)):
        together = steered.generate(input_ids=same, **arguments)
    assert not torch.equal(together[0], together[1])
    for row, c in enumerate(coefficients):
        with steer(steered, c):
            alone = steered.generate(input_ids=same[:1], **arguments)
        assert torch.equal(together[row], alone[0])


def test_repeated_rows_stand_side_by_side():
    """generate() repeats each prompt for its beams before it goes on to the next prompt."""
    assert repeat_rows(torch.tensor([0, 1]), torch.zeros(6, 2, 4)).tolist() == [0, 0, 0, 1, 1, 1]


def test_wrong_number_of_row_coefficients_raises(steered, batch):
    with pytest.raises(ValueError, match=r"^4 × 6 coefficients.*token"), steer(steered, torch.ones(4, 6)):
        steered(batch)
    with pytest.raises(ValueError, match=r"^3 coefficients.*row"), steer(steered, torch.ones(3)):
        logits(steered, batch)


def test_minus_c_turns_back():
    triangle = torch.randn(6 * 5 // 2, generator=torch.Generator().manual_seed(0))
    turn = rotation(triangle, torch.tensor([0.7, -0.7, 0.0, 1e-3]), 6)
    eye = torch.eye(6)
    assert torch.allclose(turn[0] @ turn[0].mT, eye, atol=1e-6)
    assert torch.allclose(turn[1], turn[0].mT, atol=1e-6)
    assert torch.equal(turn[2], eye)
    skew = torch.zeros(6, 6)
    skew[tuple(torch.triu_indices(6, 6, 1))] = triangle
    assert torch.allclose((turn[3] - eye) / 1e-3, skew - skew.mT, atol=1e-2)


def test_delta_is_that_of_the_formula(steered):
    """K(c) = R_out diag(S exp(cλ)) R_inᵀ − diag(S), written out with matrices of one layer."""
    site = next(m for m in steered.modules() if isinstance(m, SvdSteeringLayer))
    x = torch.randn(2, 3, site.in_features, generator=torch.Generator().manual_seed(0))
    u, s, v = (getattr(site, f"svd_steering_{name}")["default"] for name in "usv")
    for c in (1.0, -1.5):
        one = torch.tensor([c])
        r_in, r_out = (rotation(getattr(site, f"svd_steering_{n}")["default"], one, 8)[0] for n in ("in", "out"))
        spread = torch.diag(s * torch.exp(c * site.svd_steering_lambda["default"]))
        change = u @ (r_out @ spread @ r_in.T - torch.diag(s)) @ v.T
        with steer(steered, c), torch.no_grad():
            assert torch.allclose(site(x), site.base_layer(x) + x @ change.T, atol=1e-5)


def test_only_the_adapter_trains(steered, batch):
    before = {name: p.detach().clone() for name, p in steered.named_parameters()}
    optimizer = torch.optim.SGD([p for p in steered.parameters() if p.requires_grad], lr=1.0)
    steered(batch, labels=batch).loss.backward()
    optimizer.step()
    for name, parameter in steered.named_parameters():
        assert torch.equal(parameter, before[name]) != (".svd_steering_" in name), name


def test_saved_bases_are_the_top_singular_triples():
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).double()
    exact = torch.linalg.svdvals(weight)[:5]
    for niter, tolerance in ((0, 1e-10), (4, 1e-2)):
        u, s, v = top_singular_triples(weight, 5, niter, seed=0)
        assert torch.allclose(s, exact, rtol=tolerance)
        assert torch.allclose(u.T @ weight @ v, torch.diag(s), atol=10 * tolerance)


def test_creating_an_adapter_leaves_the_random_state_alone(base):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    get_peft_model(base, SvdSteeringConfig(r=4, target_modules=["q_proj"]))
    assert torch.equal(torch.rand(1), expected)


LOADER = """
import json, sys, torch
import repeng
from peft import PeftModel
from repeng import tiny

torch.manual_seed(99)
folder, out = sys.argv[1:]
torch.linalg.svd = torch.svd_lowrank = None  # loading must not need them
base, tokenizer = tiny.load()
model = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=len(folder) % 2 == 0).eval()
batch = torch.tensor(json.load(open(folder + "/batch.json")))
result = {}
for c in (-1.0, 0.0, 1.0):
    with repeng.steer(model, c), torch.no_grad():
        result[str(c)] = model(batch).logits
from safetensors.torch import save_file
save_file(result, out)
"""


@pytest.mark.processes
@pytest.mark.parametrize("suffix", ["a", "ab"])
def test_a_fresh_process_loads_the_same_logits_without_svd(steered, batch, tmp_path, suffix):
    """Both ways PEFT has of loading (`low_cpu_mem_usage`): the parity of the folder's name chooses."""
    folder = tmp_path / suffix
    steered.save_pretrained(folder)
    (folder / "batch.json").write_text(json.dumps(batch.tolist()))
    subprocess.run([sys.executable, "-c", LOADER, str(folder), str(tmp_path / "out")], check=True, timeout=120)
    loaded = load_file(tmp_path / "out")
    for c in (-1.0, 0.0, 1.0):
        with steer(steered, c):
            assert torch.equal(loaded[str(c)], logits(steered, batch)), c


def test_loading_runs_no_svd(steered, tmp_path, monkeypatch):
    steered.save_pretrained(tmp_path)
    monkeypatch.setattr(layer_module, "top_singular_triples", None)
    PeftModel.from_pretrained(tiny.load()[0], tmp_path)


@pytest.mark.parametrize("change", ["delete", "rename", "add", "add elsewhere", "delete all"])
def test_a_missing_or_strange_key_raises_and_is_named(steered, tmp_path, change):
    steered.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if k.endswith("layers.1.mlp.up_proj.svd_steering_v"))
    named = key
    match change:
        case "delete":
            del tensors[key]
        case "rename":
            tensors[key + "_old"] = tensors.pop(key)
        case "add":
            named = key.replace("layers.1", "layers.5")
            tensors[named] = tensors[key].clone()
        case "add elsewhere":
            named = "base_model.model.model.norm.weight"
            tensors[named] = torch.ones(128)
        case "delete all":
            tensors = {"x": torch.ones(1)}
    save_file(tensors, path)
    with pytest.raises(ValueError) as error:
        PeftModel.from_pretrained(tiny.load()[0], tmp_path)
    assert named in str(error.value) or change == "delete all"


def test_a_stray_key_is_refused_by_plain_load_state_dict_too(steered):
    state = steered.state_dict()
    key = next(k for k in state if ".svd_steering_s.default" in k)
    del state[key]
    with pytest.raises(ValueError, match="missing"):
        steered.load_state_dict(state, strict=False)


def test_two_adapters_are_set_apart_and_add_up(embedded, base, batch):
    config = SvdSteeringConfig(r=4, target_modules=["q_proj"], init_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(base, config, adapter_name="one").eval()
    model.add_adapter("two", copy.deepcopy(config))
    model.base_model.set_adapter(["one", "two"])
    alone = {}
    for name, other in (("one", "two"), ("two", "one")):
        with steer(model, 0.0, adapter_name=other), steer(model, 2.0, adapter_name=name):
            alone[name] = logits(model, batch)
    assert not torch.allclose(alone["one"], alone["two"], atol=1e-3)
    with steer(model, 0.0):
        assert torch.equal(logits(model, batch), logits(embedded[0], batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(embedded, batch, dtype):
    half = copy.deepcopy(embedded[0]).to(dtype)
    expected = logits(half, batch)
    torch.manual_seed(0)
    config = SvdSteeringConfig(r=8, target_modules=["v_proj", "up_proj"], init_weights=False)
    model = get_peft_model(half, config).eval()
    with steer(model, 0.0):
        assert torch.equal(logits(model, batch), expected)
    with steer(model, 1.0):
        out = logits(model, batch)
    assert out.dtype == dtype and out.isfinite().all() and not torch.equal(out, expected)


def counted_solves(monkeypatch):
    """Shapes of the right-hand sides of every linear solve from here on."""
    shapes, solve = [], torch.linalg.solve

    def counting(a, b):
        shapes.append(tuple(b.shape))
        return solve(a, b)

    monkeypatch.setattr(torch.linalg, "solve", counting)
    return shapes


def test_rotations_of_equal_rank_are_one_solve_a_step_and_minus_c_is_none(steered, batch, monkeypatch):
    torch.manual_seed(2)
    steered.add_adapter("other", SvdSteeringConfig(r=4, target_modules=["kv", "residual"], init_weights=False))
    steered.base_model.set_adapter(["default", "other"])
    shapes = counted_solves(monkeypatch)
    with steer(steered, torch.tensor([1.0, -1.0, 1.0, -1.0])):
        steered(batch, labels=batch).loss.backward()
    # Seven sites of two layers turn input and output; k, v and the residual stream of six layers turn one side.
    assert sorted(shapes) == [(18, 1, 4, 4), (28, 1, 8, 8)]


def test_gradients_of_the_batched_rotations_are_those_of_autograd():
    generator = torch.Generator().manual_seed(0)
    triangles = [torch.randn(6, generator=generator).requires_grad_() for _ in range(3)]
    coefficient = torch.tensor([0.5, -0.5, 2.0, 0.0])
    magnitude, which = torch.unique(coefficient.abs(), return_inverse=True)
    weight = torch.randn(3, 4, 4, 4, generator=generator)
    turns = Rotations.apply(coefficient, magnitude, which, 4, *triangles)
    plain = [rotation(triangle, coefficient, 4) for triangle in triangles]
    for turn, expected in zip(turns, plain, strict=True):
        assert torch.allclose(turn, expected, atol=1e-6)
    used = [0, 2]  # a site that a loss does not reach has no gradient
    batched = torch.autograd.grad(sum((weight[i] * turns[i]).sum() for i in used), triangles, allow_unused=True)
    expected = torch.autograd.grad(sum((weight[i] * plain[i]).sum() for i in used), triangles, allow_unused=True)
    assert batched[1] is None or not batched[1].any()
    for i in used:
        assert torch.allclose(batched[i], expected[i], atol=1e-5)


def nudge(parameter):
    with torch.no_grad():
        parameter.mul_(3.0)


def reassign(parameter):
    parameter.data = parameter.data * 3.0


@pytest.mark.parametrize("change", [nudge, reassign])
def test_what_generation_keeps_follows_the_parameters(steered, batch, change, monkeypatch):
    shapes = counted_solves(monkeypatch)
    with steer(steered, 1.0):
        first = logits(steered, batch)
        solves = len(shapes)
        assert torch.equal(logits(steered, batch), first) and len(shapes) == solves  # kept
        change(next(p for n, p in steered.named_parameters() if "svd_steering_in" in n))
        second = logits(steered, batch)
        assert not torch.allclose(second, first, atol=1e-4)
    with steer(steered, 1.0):
        assert torch.allclose(logits(steered, batch), second, atol=1e-6)
    with steer(steered, -1.0):
        assert not torch.allclose(logits(steered, batch), second, atol=1e-3)


def test_what_generation_keeps_does_not_outlive_a_training_step(steered, batch):
    """Optimizers of other libraries write to parameters behind PyTorch's back; a pass with gradients comes before."""
    with steer(steered, 1.0):
        first = logits(steered, batch)
        steered(batch, labels=batch).loss.backward()
        for parameter in steered.parameters():
            if parameter.requires_grad:
                parameter.data.add_(parameter.grad, alpha=-1.0)
        again = steered(batch).logits.detach()  # with gradients: the rotations of the step before are gone
        second = logits(steered, batch)
    with steer(steered, 1.0):
        assert torch.equal(logits(steered, batch), second) and not torch.allclose(first, second, atol=1e-3)
        assert torch.allclose(again, second, atol=1e-5)


def test_a_copied_model_has_a_coefficient_of_its_own(steered, batch):
    with steer(steered, 1.0):
        expected = logits(steered, batch)
        twin = copy.deepcopy(steered)
        with steer(twin, -1.0):
            assert not torch.allclose(logits(twin, batch), expected, atol=1e-3)
            assert torch.equal(logits(steered, batch), expected)
        assert torch.equal(logits(twin, batch), expected)
        site = next(m for m in steered.modules() if isinstance(m, SvdSteeringLayer))
        site(torch.randn(1, 2, site.in_features))  # leaves rotations with a graph for the sites behind it
        copy.deepcopy(steered)


def test_weights_that_are_not_finite_are_not_merged(steered):
    before = {key: tensor.clone() for key, tensor in steered.state_dict().items()}
    site = next(m for m in steered.modules() if isinstance(m, SvdSteeringLayer))
    with torch.no_grad():
        site.svd_steering_lambda["default"].fill_(torch.inf)
    for merge in (site.merge, steered.merge_adapter, steered.merge_and_unload):
        with pytest.raises(ValueError, match="NaN or infinite"):
            merge()
    with torch.no_grad():
        site.svd_steering_lambda["default"].zero_()
    with pytest.raises(ValueError, match="rows"), steer(steered, torch.ones(4)):
        steered.merge_adapter()
    assert not any(m.merged for m in steered.modules() if isinstance(m, SvdSteeringLayer))
    for key, tensor in steered.state_dict().items():
        assert torch.equal(tensor, before[key]) or "lambda" in key, key


def test_an_overflow_is_found_by_safe_merge(base):
    half = base.half()
    model = get_peft_model(half, SvdSteeringConfig(r=4, target_modules=["q_proj"], layers_to_transform=[0]))
    site = next(m for m in model.modules() if isinstance(m, SvdSteeringLayer))
    with torch.no_grad():
        site.svd_steering_lambda["default"].fill_(20.0)
    before = site.base_layer.weight.clone()
    with pytest.raises(ValueError, match="float16"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(site.base_layer.weight, before)


def test_an_inactive_or_deleted_residual_does_not_stop_a_merge(base, batch):
    torch.manual_seed(0)
    model = get_peft_model(base, SvdSteeringConfig(r=4, target_modules=["q_proj"], init_weights=False)).eval()
    with steer(model, 0.5):
        expected = logits(model, batch)
    model.add_adapter("second", SvdSteeringConfig(r=4, target_modules=["q_proj", "residual"], init_weights=False))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for names in (["second"], ["default", "second"]):
        with pytest.raises(ValueError, match="residual-writers"):
            model.merge_adapter(names)
        with pytest.raises(ValueError, match="residual-writers"):
            model.merge_and_unload(adapter_names=names)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    with steer(model, 0.5):
        model.merge_adapter(["default"])
    assert torch.allclose(logits(model, batch), expected, atol=1e-4)
    model.unmerge_adapter()
    model.delete_adapter("second")
    with steer(model, 0.5):
        merged = model.merge_and_unload()
    assert torch.allclose(logits(merged, batch), expected, atol=1e-4)
    assert not any(m._forward_hooks for m in merged.modules())


def test_bias_grouped_heads_and_conv1d_are_kept():
    """Qwen2 has biases and fewer k/v heads, GPT-2 a transposed weight: at c = 0 and 1 the formula holds for both."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4}
    qwen = Qwen2ForCausalLM(Qwen2Config(hidden_size=32, intermediate_size=48, num_key_value_heads=2, **sizes))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, bos_token_id=0, eos_token_id=0, **sizes))
    ids = torch.arange(8)[None]
    for model, targets in ((qwen, ["k_proj", "down_proj"]), (gpt2, ["c_attn", "c_proj"])):
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        model.eval()
        expected = logits(model, ids)
        steered = get_peft_model(model, SvdSteeringConfig(r=8, target_modules=targets, init_weights=False)).eval()
        with steer(steered, 0.0):
            assert torch.equal(logits(steered, ids), expected)
        site = next(m for m in steered.modules() if isinstance(m, SvdSteeringLayer))
        u, s, v = (getattr(site, f"svd_steering_{name}")["default"] for name in "usv")
        assert torch.allclose(u.T @ dense_weight(site.base_layer) @ v, torch.diag(s), atol=1e-3)
        with steer(steered, 10.0):
            assert (logits(steered, ids) - expected).abs().max() > 1e-4


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"target_modules": ["q_prj"]}, ["q_prj", "q_proj", "down_proj"]),
        ({"target_modules": ["q_proj", "nothing"]}, ["nothing", "q_proj"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [17]}, ["17"]),
        ({"target_modules": ["self_attn"]}, ["self_attn", "cannot be adapted"]),
        ({"target_modules": ["q_proj", "k_proj"], "r": 65}, ["r=65", "k_proj", "64"]),
        ({"target_modules": ".*q_proj", "layers_to_transform": [1]}, ["regular expression"]),
        ({"target_modules": ["q_proj"], "r": 1}, ["r must be"]),
        ({"target_modules": ["q_proj"], "rotate_input": False, "scale": False}, ["nothing to learn"]),
    ],
)
def test_bad_settings_are_refused_before_any_svd(base, settings, words, monkeypatch):
    monkeypatch.setattr(layer_module, "top_singular_triples", None)
    with pytest.raises(ValueError) as error:
        get_peft_model(base, SvdSteeringConfig(**{"r": 4, **settings}))
    for word in words:
        assert word in str(error.value)
    assert not any(isinstance(m, SvdSteeringLayer) for m in base.modules())


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False),
        OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj"], init_weights=False),
        PsoftConfig(r=4, target_modules=["q_proj"], init_weights=False),
    ],
    ids=lambda config: type(config).__name__,
)
def test_other_methods_of_peft_still_work(base, batch, tmp_path, config):
    model = get_peft_model(base, copy.deepcopy(config))
    before = logits(model.eval(), batch)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(batch, labels=batch).loss.backward()
    optimizer.step()
    expected = logits(model.eval(), batch)
    assert not torch.allclose(expected, before, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.load()[0], tmp_path).eval()
    assert torch.allclose(logits(again, batch), expected, atol=1e-5)


def test_a_decoder_layer_that_returns_a_tuple_is_steered(base):
    """As transformers 4 did; what else the layer returns stays."""
    layer = base.model.layers[0]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: (forward(*args, **kwargs), "kept")
    config = SvdSteeringConfig(r=4, target_modules="residual", layers_to_transform=0, init_weights=False)
    model = get_peft_model(base, config)
    h = torch.randn(2, 3, 128)
    position = base.model.rotary_emb(h, torch.arange(3)[None])
    with torch.no_grad(), steer(model, 3.0):
        moved = layer(h, position_embeddings=position)
    with torch.no_grad(), steer(model, 0.0):
        clean = layer(h, position_embeddings=position)
    assert moved[1] == clean[1] == "kept" and not torch.allclose(moved[0], clean[0], atol=1e-3)


@pytest.mark.parametrize("shape", [(), (4,)])
def test_the_callers_tensor_is_not_the_coefficient(steered, batch, shape):
    given = torch.ones(shape)
    with steer(steered, given):
        expected = logits(steered, batch)
        given.fill_(-1.0)
        with torch.enable_grad():  # computed anew
            assert torch.allclose(steered(batch).logits, expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")  # PEFT's own
def test_adapters_merged_one_after_the_other_come_off_together(base, batch):
    config = SvdSteeringConfig(r=4, target_modules=["q_proj"], init_weights=False)
    model = get_peft_model(base, config)
    model.add_adapter("second", copy.deepcopy(config))
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    model.unmerge_adapter()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())


def test_a_saved_configuration_alone_makes_no_adapter(steered, base, batch, tmp_path):
    steered.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    for target in (["q_proj"], ["residual"]):
        fresh = copy.deepcopy(config)
        fresh.target_modules, fresh.resolved_modules, fresh.fingerprint = target, None, None
        model = get_peft_model(tiny.load()[0], fresh)
        with pytest.raises(ValueError, match="init_bases=True"):
            logits(model, batch)
        if target == ["q_proj"]:
            with pytest.raises(ValueError, match="NaN"):
                model.merge_adapter()
    config.init_bases = True
    assert logits(get_peft_model(tiny.load()[0], config), batch).isfinite().all()


def test_disabling_a_merged_adapter_is_the_base_and_keeps_the_merge(embedded, steered, batch):
    with steer(steered, 0.5):
        steered.merge_adapter()
    expected = logits(steered, batch)
    with steered.disable_adapter():
        assert torch.equal(logits(steered, batch), logits(embedded[0], batch))
    assert torch.equal(logits(steered, batch), expected)
    steered.to(torch.float64).unmerge_adapter()
    with steer(steered, 0.0):
        assert torch.allclose(logits(steered, batch).float(), logits(embedded[0], batch), atol=1e-4)


def test_disabling_leaves_requires_grad_alone(steered):
    before = {name: p.requires_grad for name, p in steered.named_parameters()}
    chosen = next(name for name in before if "svd_steering_in" in name)
    steered.get_parameter(chosen).requires_grad_(False)
    with steered.disable_adapter():
        pass
    assert {name for name, p in steered.named_parameters() if p.requires_grad != before[name]} == {chosen}


def test_a_forward_in_inference_mode_does_not_spoil_training(steered, batch):
    with steer(steered, torch.tensor([1.0, -1.0, 0.5, 0.0])):
        with torch.inference_mode(), steer(steered, 0.0):
            steered(batch)
        steered(batch, labels=batch).loss.backward()
    with torch.inference_mode(), steer(steered, torch.tensor([1.0, -1.0, 0.5, 0.0])):
        steered(batch)
        with torch.inference_mode(False):
            steered(batch, labels=batch).loss.backward()
    assert any(p.grad.any() for p in steered.parameters() if p.grad is not None)


def test_nothing_is_kept_outside_of_steer(steered, batch):
    """Writing through .data, as some optimizers and averages do, is seen at once."""
    before = logits(steered, batch)
    with steer(steered, -1.0):
        logits(steered, batch)
    assert torch.equal(logits(steered, batch), before)
    for parameter in steered.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(3.0)
    assert not torch.allclose(logits(steered, batch), before, atol=1e-3)


def test_an_inactive_adapter_cannot_be_steered(steered):
    steered.add_adapter("second", SvdSteeringConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"not active.*set_adapter"), steer(steered, 1.0, adapter_name="second"):
        pass


def test_autocast_turns_in_float32(steered, batch):
    with steer(steered, 1.0):
        expected = logits(steered, batch)
        sites = [m for m in steered.modules() if isinstance(m, SvdSteeringLayer)]
        plain = [site.core("default") for site in sites]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cores = [site.core("default") for site in sites]
            found = logits(steered, batch)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(cores, plain, strict=True))
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_returned_sequences_take_the_coefficient_of_their_prompt(steered, batch):
    settings = {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 3, "top_k": 1}
    with steer(steered, torch.tensor([4.0, -4.0])):
        together = steered.generate(input_ids=batch[:1].repeat(2, 1), **settings)
    for row, c in enumerate((4.0, -4.0)):
        with steer(steered, c):
            alone = steered.generate(input_ids=batch[:1], **settings)
        assert torch.equal(together[3 * row : 3 * row + 3], alone)
    assert not torch.equal(together[0], together[3])


def planted_differences(model, generator):
    """By module, differences along two singular directions that are not among the top ones, and their indices."""
    differences, planted = {}, {}
    for name in model.peft_config["default"].resolved_modules:
        module = model.get_base_model().get_submodule(name)
        if isinstance(module, SvdSteeringLayer):
            directions = torch.linalg.svd(dense_weight(module.base_layer), full_matrices=False).Vh
        else:
            directions = torch.linalg.svd(torch.cat(writers(module), dim=1), full_matrices=False).U.T
        planted[name] = directions[[20, 25]]
        differences[name] = torch.randn(9, 2, generator=generator) @ planted[name]
    return differences, planted


def test_the_pairs_choose_which_singular_directions_turn(embedded, base, batch):
    targets = ["q_proj", "down_proj", "residual"]
    config = SvdSteeringConfig(r=6, target_modules=targets, layers_to_transform=[2], svd_niter=0)
    model = get_peft_model(base, config).eval()
    differences, planted = planted_differences(model, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.down_proj"):
        model.base_model.select_directions({k: d for k, d in differences.items() if "down_proj" not in k})
    model.base_model.select_directions(differences)
    for name, directions in planted.items():
        site = model.base_model._site(name)
        kept = site.svd_steering_v if isinstance(site, Linear) else site.svd_steering_u
        inside = directions @ kept["default"]
        assert torch.allclose(inside.norm(dim=1), torch.ones(2), atol=1e-3), name
        if isinstance(site, Linear):
            u, s, v = (getattr(site, f"svd_steering_{part}")["default"] for part in "usv")
            assert torch.allclose(u.T @ dense_weight(site.base_layer) @ v, torch.diag(s), atol=1e-3)
    assert torch.allclose(logits(model, batch), logits(embedded[0], batch), atol=1e-5)
