"""Folders of adapters from strangers: what cannot be meant is refused by name, before a base model is there."""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from repeng.control.adapter_folder import CONFIG, WEIGHTS, AdapterFolder
from repeng.tuner import SvdSteeringLayer

GOLDEN = Path(__file__).parents[1] / "golden" / "v1"
NAN = float("nan")


@pytest.fixture(scope="module")
def base():
    return LlamaForCausalLM.from_pretrained(GOLDEN / "base").eval()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copy(GOLDEN / name, tmp_path / "a" / name)
    return tmp_path / "a"


@pytest.fixture
def lora(base, tmp_path):
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    model.save_pretrained(tmp_path / "l")
    return tmp_path / "l"


def rewrite(folder, **changes):
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **changes}))


def change(folder, part, how):
    stored = load_file(folder / WEIGHTS)
    key = next(key for key in sorted(stored) if part in key)
    save_file({**stored, key: how(stored[key]).contiguous()}, folder / WEIGHTS)


def refused(folder, *words):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        AdapterFolder.read(folder)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in (str(folder), *words))


def test_good_ones_are_read_and_loaded(folder, lora, base):
    for path in (folder, lora):
        model = AdapterFolder.read(path).load(copy.deepcopy(base))
        assert isinstance(model, PeftModel)


FIELDS = [
    ("r", ["4", 4.0, True, None, 1, 5, 10**9]),
    ("target_modules", [5, [5], [""], "(", "(a+)+$", "(a|a)*b", ".*" * 9, ["q_proj"]]),
    ("resolved_modules", [None, [], [5], ["a\x00b"], ["model.layers.1"] * 2]),
    ("layers_to_transform", [["1"], True, [1.5]]),
    ("fingerprint", [5, {}, {"dtype": "x", "weights": {"a": [NAN] * 8}}, {"dtype": "x", "weights": {"a": [1.0]}}]),
    ("calibration", [5, {"plus": 1}, *({"plus": one, "minus": 1} for one in (0, -1, NAN, "1", True, 1e-300))]),
    ("rotate_input", [1, "yes", None]),
    ("init_bases", [True, None]),
    ("format_version", [3, "1", True, 0]),
    ("svd_seed", [-1, 2**80]),
    ("peft_type", ["IA3", "APASTOADAPTER", 5, []]),
    ("modules_to_save", [["nothing"], 5]),
    ("rotate_inputt", [True]),
]


@pytest.mark.parametrize("key, values", [(key, values) for key, values in FIELDS if key != "target_modules"])
def test_fields_that_cannot_be_meant(folder, key, values):
    for value in values:
        rewrite(folder, **{key: value})
        unnamed = (key, value) in (("r", 5), ("peft_type", "APASTOADAPTER")) or "nan" in str(value)  # NaN is no JSON
        refused(folder, *([] if unnamed else [key]))
        shutil.copy(GOLDEN / CONFIG, folder / CONFIG)


@pytest.mark.parametrize("value", [5, [5], [""], "(", "(a+)+$", "(a|a)*b", ".*" * 9], ids=str)
def test_targets_that_cannot_be_meant_or_take_hours_to_match(folder, lora, value):
    for path in (folder, lora):
        rewrite(path, target_modules=value, layers_to_transform=None)
        if (path, value) != (lora, [""]):
            refused(path, "target_modules")


def test_modules_that_contradict_each_other(folder, base):
    rewrite(folder, target_modules=["q_proj"])
    model = copy.deepcopy(base)
    with pytest.raises(ValueError, match=r"target_modules.*resolved_modules adds"):
        AdapterFolder.read(folder).load(model)
    assert not any(isinstance(module, SvdSteeringLayer) for module in model.modules())


TENSORS = {
    "NaN": lambda t: t * NAN,
    "infinite": lambda t: t + float("inf"),
    "huge": lambda t: t + 1e30,
    "whole numbers": lambda t: t.int(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "one dimension more": lambda t: t[None],
    "cut": lambda t: t[..., :-1],
    "empty": lambda t: t[:0],
}


@pytest.mark.parametrize("how", TENSORS)
@pytest.mark.parametrize("part", ["steering_u", "steering_s", "steering_in", "lambda", "lora_A", "lora_B"])
def test_tensors_that_cannot_be_meant(folder, lora, part, how):
    if (part, how) in (("lora_B", "huge"), ("lora_A", "cut")):
        return  # the product counts; a narrower input is another base's, which `check` tells
    path = lora if "lora" in part else folder
    change(path, part, TENSORS[how])
    refused(path, part)


def test_bases_are_orthonormal_and_singular_values_positive(folder):
    change(folder, "steering_v", lambda t: t * 0.9)
    refused(folder, "steering_v", "orthogonal")
    shutil.copy(GOLDEN / WEIGHTS, folder / WEIGHTS)
    change(folder, "steering_s", lambda t: -t)
    refused(folder, "steering_s", "0 or more")


def test_what_does_nothing_is_refused(folder, lora):
    stored = load_file(folder / WEIGHTS)
    learned = ("in", "out", "lambda", "shift")
    save_file({k: t * (k.split("svd_steering_")[1] not in learned) for k, t in stored.items()}, folder / WEIGHTS)
    refused(folder, "does nothing")
    stored = load_file(lora / WEIGHTS)
    save_file({key: tensor * ("lora_A" in key) for key, tensor in stored.items()}, lora / WEIGHTS)
    refused(lora, "does nothing")


LORA = [
    ("lora_alpha", [0, -8, "x", None, True]),
    ("r", ["4", 0, 8, True]),
    ("bias", ["all"]),
    ("use_dora", [True]),
    ("megatron_config", [{"a": 1}]),
    ("rank_pattern", [{"(a+)+$": 4}, 5]),
    ("modules_to_save", [["lm_head"]]),
]


@pytest.mark.parametrize("key, values", LORA)
def test_fields_of_a_lora(lora, key, values):
    kept = (lora / CONFIG).read_text()
    for value in values:
        rewrite(lora, **{key: value})
        refused(lora, f"{key}={value}" if (key, value) == ("r", 8) else key)
        (lora / CONFIG).write_text(kept)


def test_missing_and_foreign_tensors(folder, lora, base):
    stored = load_file(lora / WEIGHTS)
    save_file({k: t for k, t in stored.items() if ".0." not in k}, lora / WEIGHTS)
    with pytest.raises(ValueError, match=r"missing: .*layers\.0"):
        AdapterFolder.read(lora).load(copy.deepcopy(base))
    save_file({k.replace("q_proj", "z_proj"): t for k, t in stored.items()}, lora / WEIGHTS)
    with pytest.raises(ValueError, match="z_proj"):
        AdapterFolder.read(lora).check(base)
    save_file({k: t[:, :-1].contiguous() if "lora_A" in k else t for k, t in stored.items()}, lora / WEIGHTS)
    with pytest.raises(ValueError, match=r"lora_A.*wide"):
        AdapterFolder.read(lora).check(base)


FILES = {
    "empty": b"",
    "cut": (GOLDEN / WEIGHTS).read_bytes()[:-9],
    "a header of 2**60 bytes": (1 << 60).to_bytes(8, "little") + b"{}",
    "a picture": b"\x89PNG" + bytes(99),
    "a pickle": b"\x80\x04.",
}


@pytest.mark.parametrize("data", FILES)
def test_other_files(folder, data):
    (folder / WEIGHTS).write_bytes(FILES[data])
    refused(folder, WEIGHTS)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 99999, '{"r": 4, "r": 5}', '{"r": NaN}', "r: 4"], ids=range(7))
def test_other_configurations(folder, text):
    (folder / CONFIG).write_text(text)
    refused(folder, CONFIG)


def test_links_pipes_and_pickles(folder):
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"")
    refused(folder, WEIGHTS, "pickle")
    os.mkfifo(folder / WEIGHTS)
    refused(folder, WEIGHTS)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(GOLDEN / WEIGHTS)
    refused(folder, WEIGHTS, "link")
