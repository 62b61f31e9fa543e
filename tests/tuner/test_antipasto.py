"""Adapters in the files of wassname/AntiPaSTO, against the formula that it publishes."""

import copy
import json
import math

import pytest
import tiny_models
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from repeng import SvdSteeringConfig, steer
from repeng.export.factors import factors_at
from repeng.tuner import SvdSteeringLayer, load_antipasto

# Modules with their ranks: one has fewer directions than the others.
RANKS = {"model.layers.0.mlp.down_proj": 6, "model.layers.1.self_attn.o_proj": 4, "model.layers.1.mlp.down_proj": 6}
IDS = torch.arange(3, 13)[None].repeat(2, 1)
ALPHAS = (-1.5, -1.0, 0.0, 0.4, 1.0, 2.0)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def write(folder, base, rotate_u=False, rotate_v=True, max_rotation_angle=math.pi / 4, **changes):
    """The three files of `save_adapter` in antipasto/peft_utils/load.py; bases are some triples, not the top ones."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weights, bases = {}, {}
    for name, r in RANKS.items():
        u, s, vh = torch.linalg.svd(base.get_submodule(name).weight.detach().float(), full_matrices=False)
        chosen = torch.randperm(s.numel(), generator=generator)[:r]
        parts = {"u": u[:, chosen], "s": s[chosen], "v": vh[chosen].T}
        key = f"base_model.model.{name}"
        bases |= {f"svd_bases.{key.replace('.', '_')}.{part}": t.contiguous() for part, t in parts.items()}
        weights[f"{key}.antipasto_delta_s"] = torch.randn(r, generator=generator) * 0.3
        for side in [side for side, turns in (("u", rotate_u), ("v", rotate_v)) if turns]:
            weights[f"{key}.antipasto_rotation_params_{side}"] = torch.randn(r, r, generator=generator)
    config = {
        "peft_type": "APASTOADAPTER",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/model",
        "r": 6,
        "rotate_u": rotate_u,
        "rotate_v": rotate_v,
        "rotation_method": "cayley",
        "alpha": 1.0,
        "max_rotation_angle": max_rotation_angle,
        "target_modules": ".*(\\.0\\..*down_proj|\\.1\\..*o_proj)",
        **changes,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, folder / "adapter_model.safetensors")
    save_file(bases, folder / "0_svd_bases.safetensors")
    return folder


def theirs(base, folder, alpha):
    """The base with weights `U_rot diag(S + αδ) V_rotᵀ + W_res`, in float64, as `get_adapted_output` has them."""
    model = copy.deepcopy(base)
    config = json.loads((folder / "adapter_config.json").read_text())
    weights, bases = (load_file(folder / f) for f in ("adapter_model.safetensors", "0_svd_bases.safetensors"))

    def rotated(basis, key):
        if key not in weights:
            return basis
        a = weights[key].double() - weights[key].double().T
        if config["max_rotation_angle"] < math.pi - 1e-6:
            a_limit = 2 * math.tan(config["max_rotation_angle"] / 2)
            a = a_limit * torch.tanh(a / a_limit)
        eye = torch.eye(len(a), dtype=a.dtype)
        return basis @ torch.linalg.inv(eye - alpha * a / 2) @ (eye + alpha * a / 2)

    for name in RANKS:
        key = f"base_model.model.{name}"
        u, s, v = (bases[f"svd_bases.{key.replace('.', '_')}.{part}"].double() for part in "usv")
        weight = model.get_submodule(name).weight
        w_res = weight.detach().double() - u @ s.diag() @ v.T
        s_scaled = s + alpha * weights[f"{key}.antipasto_delta_s"].double()
        u_rot = rotated(u, f"{key}.antipasto_rotation_params_u")
        v_rot = rotated(v, f"{key}.antipasto_rotation_params_v")
        weight.data = (u_rot @ s_scaled.diag() @ v_rot.T + w_res).to(weight)
    return model


@pytest.fixture
def llama():
    return tiny_models.build("llama").eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rotate_u": True},
        {"rotate_v": False},
        {"max_rotation_angle": math.inf},
        {"rotate_u": True, "rotate_v": False, "max_rotation_angle": 1.0},
    ],
    ids=str,
)
def test_it_does_what_the_published_formula_does_at_every_alpha(llama, tmp_path, options):
    folder = write(tmp_path / "theirs", llama, **options)
    expected = {alpha: logits(theirs(llama, folder, alpha)) for alpha in ALPHAS}
    base = logits(llama)
    model = load_antipasto(copy.deepcopy(llama), folder, "honest").eval()
    for alpha, wanted in expected.items():
        with steer(model, alpha):
            assert torch.allclose(logits(model), wanted, atol=2e-5), alpha
    assert (expected[1.0] - base).abs().max() > 0.01 and not torch.allclose(expected[-1.0], expected[1.0], atol=0.01)
    with steer(model, torch.tensor([2.0, -1.0])):
        rows = logits(model)
    assert torch.allclose(rows, torch.stack([expected[2.0][0], expected[-1.0][1]]), atol=2e-5)
    with steer(model, 0.0):
        assert torch.equal(logits(model), base)


def test_it_is_an_adapter_of_this_package_from_then_on(llama, tmp_path):
    folder = write(tmp_path / "theirs", llama)
    expected = logits(theirs(llama, folder, -1.0))
    model = load_antipasto(copy.deepcopy(llama), folder)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["peft_type"] == "SVD_STEERING" and config["additive_scale"] and config["format_version"] == 2
    again = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "ours").eval()
    with steer(again, -1.0):
        assert torch.allclose(logits(again), expected, atol=2e-5)
        assert torch.allclose(logits(again.merge_and_unload()), expected, atol=2e-5)
    change = factors_at(model, -1.0, "default")["model.layers.0.mlp.down_proj"]
    moved, still = (
        m.get_submodule("model.layers.0.mlp.down_proj").weight for m in (theirs(llama, folder, -1.0), llama)
    )
    assert torch.allclose(change.b @ change.a, moved - still, atol=1e-5)
    other = copy.deepcopy(llama)
    other.model.layers[0].mlp.down_proj.weight.data.add_(0.01)
    with pytest.raises(ValueError, match="another base model"):
        PeftModel.from_pretrained(other, tmp_path / "ours")


def test_a_scale_that_is_added_needs_a_scale():
    with pytest.raises(ValueError, match="additive_scale=True says how"):
        SvdSteeringConfig(scale=False, additive_scale=True)
    assert SvdSteeringConfig().format_version == 1  # what version 1 can say, its readers go on reading


def test_other_adapters_are_refused(llama, tmp_path):
    for number, (changes, message) in enumerate(
        [
            ({"peft_type": "LORA"}, "type 'LORA', not APASTOADAPTER"),
            ({"rotation_method": "matrix_exp"}, "'matrix_exp'.*'cayley' only"),
            ({"rotate_u": False, "rotate_v": False}, r"3 unexpected.*rotation_params_v"),
        ]
    ):
        folder = write(tmp_path / str(number), llama)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        with pytest.raises(ValueError, match=message):
            load_antipasto(llama, folder)
    path.write_text(json.dumps({"peft_type": "APASTOADAPTER"}))
    with pytest.raises(ValueError, match="lacks max_rotation_angle, rotate_u"):
        load_antipasto(llama, folder)
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_antipasto(llama, folder)
    (folder / "0_svd_bases.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 0_svd_bases\.safetensors.*save_svd_bases=True"):
        load_antipasto(llama, folder)
    assert not any(isinstance(module, SvdSteeringLayer) for module in llama.modules())


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("adapter_model", lambda t: t.pop(next(k for k in t if k.endswith("delta_s"))), "1 missing.*delta_s"),
        ("adapter_model", lambda t: t.update({"base_model.model.x.lora_A": torch.ones(2)}), "unexpected.*lora_A"),
        ("adapter_model", lambda t: t.clear(), "holds no tensor"),
        ("adapter_model", lambda t: t.update({k: v[:3] for k, v in t.items() if "delta" in k}), "share one rank"),
        ("adapter_model", lambda t: t.update({k: v * torch.nan for k, v in t.items()}), "gives NaN"),
        ("0_svd_bases", lambda t: t.pop(next(k for k in t if k.endswith(".v"))), r"1 missing.*\.v"),
        (
            "0_svd_bases",
            lambda t: t.update({k: v[:-1].clone() for k, v in t.items() if k[-2:] == ".u"}),
            r"here and \(31, ",
        ),
        ("0_svd_bases", lambda t: t.update({k: v * 2 for k, v in t.items() if k.endswith(".s")}), "differ by 50%"),
    ],
    ids=["no delta", "foreign tensor", "empty", "ranks", "NaN", "no basis", "width", "values"],
)
def test_files_that_do_not_fit_are_refused(llama, tmp_path, file, change, message):
    folder = write(tmp_path / "theirs", llama)
    tensors = load_file(folder / f"{file}.safetensors")
    change(tensors)
    save_file(tensors, folder / f"{file}.safetensors")
    with pytest.raises(ValueError, match=message):
        load_antipasto(llama, folder)
    assert not any(isinstance(module, SvdSteeringLayer) for module in llama.modules())


def test_another_base_is_refused(llama, tmp_path):
    folder = write(tmp_path / "theirs", llama)
    with pytest.raises(ValueError, match="lacks 3 of them"):
        load_antipasto(tiny_models.build("gpt2"), folder)
    for layer in llama.model.layers:
        torch.nn.init.normal_(layer.mlp.down_proj.weight)
    with pytest.raises(ValueError, match=r"another base model \(some/model\): .*down_proj has singular values"):
        load_antipasto(llama, folder)
