"""What every adapter must do on every architecture: the table of PEFT's `testing_common`, for this method."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
import torch._dynamo.testing
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn

from repeng import SvdSteeringConfig, steer
from repeng.tuner import SvdSteeringLayer
from repeng.tuner.layer import Linear
from repeng.tuner.residual import Residual

IDS = torch.randint(3, 59, (3, 12), generator=torch.Generator().manual_seed(0))
COMBINATIONS = [(name, kind) for name in tiny_models.ARCHITECTURES for kind in tiny_models.KINDS]
combinations = pytest.mark.parametrize("name, kind", COMBINATIONS)
MOVED = 1e-3  # what counts as a difference of logits; they are of size 1


def config(name: str, kind: str, **settings) -> SvdSteeringConfig:
    settings = {"r": 6, "init_weights": False, "rotate_output": True, **settings}
    return SvdSteeringConfig(target_modules=tiny_models.targets(name, kind), **settings)


def adapted(name: str, kind: str, **settings) -> nn.Module:
    """A model with an adapter that does something."""
    base = tiny_models.build(name)
    torch.manual_seed(1)
    return get_peft_model(base, config(name, kind, **settings)).eval()


def logits(model: nn.Module, ids: torch.Tensor = IDS, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


@combinations
def test_starts_as_the_base_and_is_it_bit_for_bit_at_0_and_disabled(name, kind):
    expected = logits(tiny_models.build(name))
    fresh = adapted(name, kind, init_weights=True)
    for c in (-2.0, 1.0):
        with steer(fresh, c):
            assert torch.allclose(logits(fresh), expected, atol=1e-4)
    model = adapted(name, kind)
    with steer(model, 1.0):
        assert (logits(model) - expected).abs().max() > MOVED
        with model.disable_adapter():
            assert torch.equal(logits(model), expected)
    for zero in (0.0, torch.zeros(len(IDS))):
        with steer(model, zero):
            assert torch.equal(logits(model), expected)
    with steer(model, 1e-6):
        assert torch.allclose(logits(model), expected, atol=1e-4)


@combinations
def test_only_the_adapter_changes_in_training(name, kind):
    model = adapted(name, kind)
    before = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        with steer(model, torch.tensor([1.0, -1.0, 0.5])):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == trainable and all(".svd_steering_" in key for key in trainable)


@combinations
def test_merging_is_exact_and_so_is_unmerging(name, kind):
    model = adapted(name, kind)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if kind != "linear":
        with pytest.raises(ValueError, match="residual-writers"):
            model.merge_adapter()
        with pytest.raises(ValueError, match="residual-writers"):
            model.merge_and_unload()
        assert all(torch.equal(weights[key], tensor) for key, tensor in model.state_dict().items())
        return
    for c in (-1.0, 0.5, 1.0):
        with steer(model, c):
            expected = logits(model)
            model.merge_adapter(safe_merge=True)
        assert torch.allclose(logits(model), expected, atol=1e-4)
        with pytest.raises(ValueError, match="unmerge_adapter"), steer(model, 1.0):
            pass
        model.unmerge_adapter()
        assert all(torch.equal(weights[key], tensor) for key, tensor in model.state_dict().items())
    with steer(model, -1.0):
        expected = logits(model)
        merged = model.merge_and_unload()
    assert not any(isinstance(m, SvdSteeringLayer) for m in merged.modules())
    assert torch.allclose(logits(merged), expected, atol=1e-4)


@combinations
def test_unloading_gives_the_base_back(name, kind):
    base = tiny_models.build(name)
    expected = logits(base)
    keys = set(base.state_dict())
    model = get_peft_model(base, config(name, kind)).unload()
    assert set(model.state_dict()) == keys and torch.equal(logits(model), expected)
    assert not any(isinstance(m, SvdSteeringLayer) or m._forward_hooks for m in model.modules())


@combinations
def test_two_adapters_add_up_and_one_can_be_deleted(name, kind):
    model = adapted(name, kind)
    torch.manual_seed(2)
    model.add_adapter("second", config(name, kind, r=4))
    alone = logits(model)
    model.set_adapter("second")
    assert (logits(model) - alone).abs().max() > MOVED
    model.base_model.set_adapter(["default", "second"])
    for site in (m for m in model.modules() if isinstance(m, SvdSteeringLayer)):
        width = site.in_features if isinstance(site, Linear) else tiny_models.WIDTH
        x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(3))
        change = {}
        with torch.no_grad():
            for both in ((0.0, 0.0), (1.0, 0.0), (0.0, -2.0), (1.0, -2.0)):
                with steer(model, both[0], adapter_name="default"), steer(model, both[1], adapter_name="second"):
                    change[both] = site(x)
        nothing, first, second, together = change.values()
        assert not torch.equal(first, nothing) and not torch.equal(second, nothing)
        assert torch.allclose(together - nothing, (first - nothing) + (second - nothing), atol=1e-5)
    model.delete_adapter("second")
    assert not any(".second" in key for key in model.state_dict())
    model.set_adapter("default")
    assert torch.equal(logits(model), alone)


@combinations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, kind, dtype):
    base = tiny_models.build(name).to(dtype)
    expected = logits(base)
    torch.manual_seed(1)
    model = get_peft_model(base, config(name, kind)).eval()
    assert all(t.dtype == torch.float32 for key, t in model.state_dict().items() if ".svd_steering_" in key)
    with steer(model, 0.0):
        assert torch.equal(logits(model), expected)
    with steer(model, torch.tensor([1.0, 0.0, -1.0])):
        out = logits(model)
    assert out.dtype == expected.dtype and out.isfinite().all()
    assert torch.equal(out[1], expected[1]) and not torch.equal(out, expected)


@combinations
def test_each_row_follows_its_own_coefficient(name, kind):
    model = adapted(name, kind)
    coefficients = torch.tensor([1.0, 0.0, -0.5])
    with steer(model, coefficients):
        together = logits(model)
    for row, c in enumerate(coefficients):
        with steer(model, c):
            assert torch.allclose(together[row], logits(model, IDS[row : row + 1])[0], atol=1e-4)


@combinations
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name, kind, side):
    model = adapted(name, kind)
    lengths = (12, 5, 9)
    ids, mask = torch.zeros_like(IDS), torch.zeros_like(IDS)
    spans = [slice(12 - n, 12) if side == "left" else slice(0, n) for n in lengths]
    for row, (n, span) in enumerate(zip(lengths, spans, strict=True)):
        ids[row, span], mask[row, span] = IDS[row, :n], 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with steer(model, torch.tensor([1.0, -1.0, 2.0])):
        together = logits(model, ids, attention_mask=mask, position_ids=positions)
    for row, (n, span, c) in enumerate(zip(lengths, spans, (1.0, -1.0, 2.0), strict=True)):
        with steer(model, c):
            assert torch.allclose(together[row, span], logits(model, IDS[row : row + 1, :n])[0], atol=1e-4)


@combinations
def test_cached_generation_is_uncached_generation(name, kind):
    model = adapted(name, kind)
    settings = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    settings |= {"attention_mask": torch.ones_like(IDS), "eos_token_id": 60}
    with steer(model, torch.tensor([1.0, -1.0, 0.0])):
        cached, plain = (model.generate(input_ids=IDS, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.logits, plain.logits, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def compile_once(name: str, kind: str) -> None:
    torch._dynamo.reset()
    model = adapted(name, kind)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    frames = []
    for c in (1.0, 0.5, -1.0, 2.0):
        with steer(model, c):
            assert torch.allclose(logits(compiled), logits(model), atol=1e-5)
        frames.append(counter.frame_count)
    assert frames[0] > 0 and frames[-1] == frames[0], frames
    with steer(model, 0.0):
        assert torch.equal(logits(compiled), logits(model))
    assert counter.frame_count <= frames[0] + 1  # the base path is one of its own
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "linear" else pytest.mark.slow) for kind in tiny_models.KINDS]
)
def test_one_compilation_serves_all_coefficients(kind):
    compile_once("qwen3", kind)


@pytest.mark.slow
@combinations
def test_one_compilation_serves_all_coefficients_everywhere(name, kind):
    compile_once(name, kind)


LOADER = """
import json, sys
from pathlib import Path
import torch
from peft import PeftModel
from safetensors.torch import save_file
import tiny_models
from repeng import steer

torch.manual_seed(99)
torch.linalg.svd = torch.svd_lowrank = None  # loading must not need them
folder = Path(sys.argv[1])
ids = torch.tensor(json.loads((folder / "ids.json").read_text()))
result = {}
for number, adapter in enumerate(sorted(p for p in folder.iterdir() if p.is_dir())):
    name, kind = adapter.name.split(" ")
    model = PeftModel.from_pretrained(tiny_models.build(name), adapter, low_cpu_mem_usage=number % 2 == 0).eval()
    for c in (-1.0, 0.0, 1.0):
        with steer(model, c), torch.no_grad():
            result[f"{adapter.name} {c}"] = model(input_ids=ids).logits
save_file(result, folder / "logits.safetensors")
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Logits of all adapters of the table, saved here, loaded by a process of its own under another seed."""
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "ids.json").write_text(json.dumps(IDS.tolist()))
    for name, kind in COMBINATIONS:
        adapted(name, kind).save_pretrained(folder / f"{name} {kind}")
    here = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", LOADER, str(folder)], check=True, timeout=200, env=environment)
    return load_file(folder / "logits.safetensors")


@pytest.mark.processes
@combinations
def test_a_fresh_process_loads_the_same_logits_without_svd(loaded, name, kind):
    model = adapted(name, kind)
    for c in (-1.0, 0.0, 1.0):
        with steer(model, c):
            assert torch.allclose(logits(model), loaded[f"{name} {kind} {c}"], atol=1e-6)


@pytest.mark.parametrize("name", [n for n, a in tiny_models.ARCHITECTURES.items() if a.fused_experts])
@pytest.mark.parametrize("target", ["down_proj", "residual-writers", "all-linear"])
def test_fused_experts_are_refused_with_what_can_be_adapted(name, target):
    with pytest.raises(ValueError) as error:
        get_peft_model(tiny_models.build(name), SvdSteeringConfig(r=4, target_modules=[target]))
    for word in ("experts", "residual", "o_proj", "q_proj"):
        assert word in str(error.value)


def test_the_vision_tower_is_left_alone():
    base = tiny_models.build("gemma3-multimodal")
    assert any("vision" in key and "q_proj" in key for key, _ in base.named_modules())
    for targets in (["q_proj", "residual"], ".*q_proj", "all-linear"):
        model = get_peft_model(copy.deepcopy(base), SvdSteeringConfig(r=4, target_modules=targets))
        sites = [key for key, m in model.named_modules() if isinstance(m, Linear | Residual)]
        assert sites and not any("vision" in key for key in sites)
