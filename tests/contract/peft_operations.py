"""What PEFT's public operations do with an adapter of this method, each in a few lines; docs/peft.md is their table.

`uv run python tests/contract/peft_operations.py` writes the table anew.
"""

import copy
import os
import pickle
import re
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, pipeline

import repeng
from repeng import SvdSteeringConfig, steer
from repeng.tuner import SvdSteeringLayer

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "peft.md"
WEIGHTS = "adapter_model.safetensors"
IDS = torch.arange(3, 13)[None]


@dataclass(frozen=True)
class Operation:
    """A row of the table. `do` gets an empty folder, and raises AssertionError if the outcome is wrong."""

    chapter: str
    text: str
    do: Callable[[Path], None]

    def row(self, folder: Path) -> str:
        """The row of the table, after it was done."""
        try:
            self.do(folder)
        except (ValueError, TypeError) as error:
            place = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
            if not place.is_relative_to(Path(repeng.__file__).parent):
                return f"| {self.text} | refused by the library |"
            sentence = str(error).replace(str(folder), "…").replace("|", "\\|")
            return f"| {self.text} | refused: {sentence} |"
        return f"| {self.text} | works |"


OPERATIONS: list[Operation] = []


def operation(chapter: str, text: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def add(do: Callable[[Path], None]) -> Callable[[Path], None]:
        OPERATIONS.append(Operation(chapter, text, do))
        return do

    return add


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, eos_token_id=2
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return model


def config(*targets: str, **settings) -> SvdSteeringConfig:
    settings = {"r": 4, "svd_niter": 0, "init_weights": False, "layers_to_transform": [0], **settings}
    return SvdSteeringConfig(target_modules=list(targets) or ["q_proj", "residual"], **settings)


def adapted(*targets: str, **settings) -> PeftModel:
    return get_peft_model(base(), config(*targets, **settings)).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def same(a: nn.Module | torch.Tensor, b: nn.Module | torch.Tensor) -> None:
    a, b = (logits(x) if isinstance(x, nn.Module) else x for x in (a, b))
    assert torch.allclose(a, b, atol=1e-5), (a - b).abs().max()


def differ(a: nn.Module, b: nn.Module) -> None:
    assert not torch.allclose(logits(a), logits(b), atol=1e-3)


def structure(model: nn.Module) -> tuple:
    """What a refused change must leave as it was."""
    states = [(key, p.requires_grad, p.dtype) for key, p in model.named_parameters()]
    active = [m.active_adapters for m in model.modules() if isinstance(m, SvdSteeringLayer)]
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    names = [name for name, _ in model.named_modules()]
    return states, names, sorted(model.state_dict()), hooks, list(getattr(model, "peft_config", {})), active


def refused_whole(model: nn.Module, change: Callable[[], object]) -> None:
    """The change is refused, and `model` is as it was."""
    before, expected = structure(model), logits(model)
    try:
        change()
    except ValueError:
        assert structure(model) == before and torch.equal(logits(model), expected)
        raise


def saved(folder: Path, **settings) -> PeftModel:
    model = adapted(**settings)
    model.save_pretrained(folder)
    return model


def broken(folder: Path) -> Path:
    """The folder of an adapter whose file lacks a tensor."""
    saved(folder)
    tensors = load_file(folder / WEIGHTS)
    del tensors[min(tensors)]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def trained(model: nn.Module) -> set[str]:
    """Names of the adapters that are trained."""
    return {key.rpartition(".")[2] for key, p in model.named_parameters() if p.requires_grad}


MAKE, LOAD, SAVE = "Making an adapter", "Loading", "Saving"
SEVERAL, MERGE, USE = "Several adapters", "Merging and taking away", "Training and use"


@operation(MAKE, "`get_peft_model`, `unload`")
def _(_folder):
    model = adapted()
    differ(model, base())
    same(model.unload(), base())


@operation(MAKE, "`get_peft_model(mixed=True)`")
def _(_folder):
    get_peft_model(base(), config(), mixed=True)


@operation(MAKE, "`get_peft_model` on a model that has an adapter of this name")
def _(_folder):
    model = adapted()
    refused_whole(model, lambda: get_peft_model(model.base_model.model, config()))


@operation(MAKE, "`get_peft_model(low_cpu_mem_usage=True)`, then a forward pass")
def _(_folder):
    logits(get_peft_model(base(), config(), low_cpu_mem_usage=True))


@operation(MAKE, "`autocast_adapter_dtype=False` on a bfloat16 model: bfloat16 is what is learned, float32 the bases")
def _(_folder):
    model = get_peft_model(base().bfloat16(), config(), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert {b.dtype for key, b in model.named_buffers() if ".svd_steering_" in key} == {torch.float32}
    model(input_ids=IDS, labels=IDS).loss.backward()


@operation(MAKE, "`exclude_modules`, without a warning that it did nothing")
def _(_folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no modules were excluded.*")
        model = adapted("q_proj", "k_proj", exclude_modules=["k_proj"])
    assert not any("k_proj.svd" in key for key in model.state_dict())


@operation(MAKE, "`modules_to_save` that the model lacks")
def _(_folder):
    model = base()
    refused_whole(model, lambda: get_peft_model(model, config(modules_to_save=["lm_haed"])))


@operation(MAKE, "fields of other methods: `target_parameters`, `ensure_weight_tying`, `bias`, `rank_pattern`")
def _(_folder):
    for field in ("target_parameters", "ensure_weight_tying", "bias"):
        try:
            config(**{field: None})
        except TypeError as error:
            assert field in str(error)
    config(rank_pattern={"q_proj": 8})


@operation(MAKE, "`inject_adapter_in_model`, a second time too")
def _(_folder):
    model = inject_adapter_in_model(config(), base(), "one")
    inject_adapter_in_model(config("q_proj", "up_proj"), model, "two")
    assert len({id(m.coefficients) for m in model.modules() if isinstance(m, SvdSteeringLayer)}) == 1
    assert list(model.peft_config) == ["one", "two"]


@operation(MAKE, "`inject_adapter_in_model(state_dict=…)` from the tensors of a model or of a file")
def _(folder):
    saved(folder)
    file = load_file(folder / WEIGHTS)
    for tensors in (file, get_peft_model_state_dict(inject_adapter_in_model(config(), base()))):
        fuller = config("q_proj", "k_proj", "residual")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT tells that the configuration has more
            model = inject_adapter_in_model(fuller, base(), state_dict=tensors)
        set_peft_model_state_dict(model, tensors)
        assert fuller.resolved_modules and not any("k_proj" in name for name in fuller.resolved_modules)
    same(inject_from(file), PeftModel.from_pretrained(base(), folder).eval())


def inject_from(tensors: dict[str, torch.Tensor]) -> nn.Module:
    model = inject_adapter_in_model(config(), base(), state_dict=tensors)
    set_peft_model_state_dict(model, tensors)
    return model.eval()


@operation(MAKE, "an adapter named with a dot or a slash")
def _(_folder):
    model = adapted()
    refused_whole(model, lambda: model.add_adapter("v1/2", config()))


@operation(MAKE, "an adapter named as a module, a number of a layer or a method of PyTorch's is")
def _(_folder):
    model = adapted()
    for name in ("q_proj", "weight", "keys", "0"):
        try:
            model.add_adapter(name, config())
        except ValueError as error:
            assert repr(name) in str(error)
            continue
        raise AssertionError(name)
    refused_whole(model, lambda: model.add_adapter("0", config()))


@operation(MAKE, "an adapter named with a space")
def _(folder):
    model = adapted()
    model.add_adapter("of honesty", config())
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(base(), folder)
    again.load_adapter(folder / "of honesty", "of honesty")
    for one in (model, again):
        one.set_adapter("of honesty")
    same(again.eval(), model)


@operation(LOAD, "`PeftModel.from_pretrained`, `low_cpu_mem_usage=True` too, with the saved configuration too")
def _(folder):
    model = saved(folder)
    for settings in ({}, {"low_cpu_mem_usage": True}, {"config": PeftConfig.from_pretrained(folder)}):
        same(PeftModel.from_pretrained(base(), folder, **settings).eval(), model)


@operation(LOAD, "`from_pretrained(config=…)` with a configuration of another rank")
def _(folder):
    saved(folder)
    model = base()
    refused_whole(model, lambda: PeftModel.from_pretrained(model, folder, config=config(r=6)))


@operation(LOAD, "`from_pretrained` of a file that lacks a tensor; the base is left as it was")
def _(folder):
    broken(folder)
    model = base()
    refused_whole(model, lambda: PeftModel.from_pretrained(model, folder))


@operation(LOAD, "`load_adapter` of such a file; nothing of it is left, and a save writes no NaN")
def _(folder):
    broken(folder)
    model = adapted()
    try:
        refused_whole(model, lambda: model.load_adapter(folder, "second"))
    finally:
        model.save_pretrained(folder / "after")
        assert not (folder / "after" / "second").exists()


@operation(LOAD, "`load_adapter` of a file that ends too early")
def _(folder):
    saved(folder)
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    model = adapted()
    refused_whole(model, lambda: model.load_adapter(folder, "second"))


@operation(LOAD, "`load_adapter` of a folder without weights")
def _(folder):
    saved(folder)
    (folder / WEIGHTS).unlink()
    model = adapted()
    refused_whole(model, lambda: model.load_adapter(folder, "second"))


@operation(LOAD, "`load_adapter` of a file without its `modules_to_save`")
def _(folder):
    saved(folder, modules_to_save=["lm_head"])
    tensors = {key: t for key, t in load_file(folder / WEIGHTS).items() if "lm_head" not in key}
    save_file(tensors, folder / WEIGHTS)
    model = adapted()
    refused_whole(model, lambda: model.load_adapter(folder, "second"))


@operation(LOAD, "`AutoModelForCausalLM.from_pretrained` and `pipeline` with the folder of an adapter")
def _(folder):
    base().save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = get_peft_model(model, config(task_type="CAUSAL_LM")).eval()
    model.save_pretrained(folder / "adapter")
    same(AutoModelForCausalLM.from_pretrained(folder / "adapter").eval(), model)
    assert pipeline.__module__  # which loads by the same call, and needs a tokenizer


@operation(LOAD, "transformers' `model.load_adapter` of a file that lacks a tensor")
def _(folder):
    broken(folder)
    model = base()
    refused_whole(model, lambda: model.load_adapter(str(folder)))


@operation(LOAD, "`set_peft_model_state_dict` of a file's tensors into an injected model")
def _(folder):
    model = saved(folder)
    injected = inject_adapter_in_model(config(), base()).eval()
    set_peft_model_state_dict(injected, load_file(folder / WEIGHTS))
    same(injected, model)


@operation(LOAD, "`load_state_dict(strict=False)` of what was learned, without the bases, in part too")
def _(_folder):
    model, other = adapted(), adapted()
    learned = {key: p.detach() * 2 for key, p in model.named_parameters() if p.requires_grad}
    for part in (learned, dict([next(iter(learned.items()))])):
        other.load_state_dict(part, strict=False)
        assert all(torch.equal(other.state_dict()[key], tensor) for key, tensor in part.items())


@operation(LOAD, "the same into an adapter whose bases never came")
def _(folder):
    saved(folder)
    model = get_peft_model(base(), PeftConfig.from_pretrained(folder))
    learned = {key: torch.zeros_like(p) for key, p in model.named_parameters() if ".svd_steering_" in key}
    model.load_state_dict(learned, strict=False)


@operation(LOAD, "`load_state_dict` of tensors of another shape")
def _(_folder):
    model = adapted()
    key = next(key for key, p in model.named_parameters() if p.requires_grad)
    refused_whole(model, lambda: model.load_state_dict({key: torch.zeros(3)}, strict=False))


@operation(LOAD, "`hotswap_adapter`")
def _(folder):
    hotswap_adapter(saved(folder), str(folder), "default")


@operation(LOAD, "`PeftMixedModel.from_pretrained`")
def _(folder):
    saved(folder)
    PeftMixedModel.from_pretrained(base(), folder)


@operation(SAVE, "`save_pretrained(safe_serialization=False)`")
def _(folder):
    model = adapted()
    model.save_pretrained(folder, safe_serialization=False)
    same(PeftModel.from_pretrained(base(), folder).eval(), model)


@operation(SAVE, "`save_embedding_layers=True`, or embeddings of a new size")
def _(folder):
    base().save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model.resize_token_embeddings(70, mean_resizing=False)
    model = get_peft_model(model, config()).eval()
    for choice in (True, "auto"):
        model.save_pretrained(folder / "adapter", save_embedding_layers=choice)
        other = base()
        other.resize_token_embeddings(70, mean_resizing=False)
        same(PeftModel.from_pretrained(other, folder / "adapter").eval(), model)


@operation(SAVE, "embeddings of a new size, loaded onto a model of the old one")
def _(folder):
    model = base()
    model.resize_token_embeddings(70, mean_resizing=False)
    get_peft_model(model, config()).save_pretrained(folder, save_embedding_layers=True)
    other = base()
    refused_whole(other, lambda: PeftModel.from_pretrained(other, folder))


@operation(SAVE, "an adapter whose tensors never came")
def _(folder):
    saved(folder)
    get_peft_model(base(), PeftConfig.from_pretrained(folder)).save_pretrained(folder / "again")


@operation(SAVE, "`save_pretrained(path_initial_model_for_weight_conversion=…)`")
def _(folder):
    saved(folder).save_pretrained(folder / "lora", path_initial_model_for_weight_conversion=str(folder))


@operation(SAVE, "`selected_adapters`, `subfolder`, `create_or_update_model_card`")
def _(folder):
    model = adapted()
    model.add_adapter("second", config())
    model.save_pretrained(folder, selected_adapters=["second"])
    assert sorted(os.listdir(folder)) == ["README.md", "second"]
    PeftModel.from_pretrained(base(), folder, subfolder="second")


@operation(SAVE, "`copy.deepcopy` and `pickle`, inside of `steer` too")
def _(_folder):
    model = adapted()
    for c in (None, -2.0):
        with steer(model, 1.0 if c is None else c):
            twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
            expected = logits(model)
        for twin in twins:
            same(logits(twin), expected)
            twin.generate(input_ids=IDS, max_new_tokens=2)  # with a key-value cache
            with steer(twin, 0.0):
                same(twin, base())
            same(logits(twin), expected)


@operation(SEVERAL, "`add_adapter`, `set_adapter`, `delete_adapter`")
def _(_folder):
    model = adapted()
    expected = logits(model)
    model.add_adapter("second", config("up_proj"))
    same(model, expected)
    model.set_adapter("second")
    assert trained(model) == {"second"}
    model.delete_adapter("second")
    model.set_adapter("default")
    same(model, expected)


@operation(SEVERAL, "`add_adapter` with the configuration of an adapter that was loaded: a copy of it")
def _(folder):
    saved(folder)
    model = PeftModel.from_pretrained(base(), folder, is_trainable=True).eval()
    expected = logits(model)
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    same(model, expected)


@operation(SEVERAL, "`add_adapter` with the configuration of one that was made here: it has the same bases")
def _(_folder):
    model = adapted("q_proj")
    names = model.peft_config["default"].resolved_modules
    model.base_model.select_directions({name: torch.eye(32)[-6:] for name in names})
    expected = logits(model)
    model.add_adapter("ref", model.peft_config["default"])
    for key, parameter in list(model.named_parameters()):
        if key.endswith(".default"):
            model.get_parameter(key.removesuffix("default") + "ref").data.copy_(parameter.data)
    model.set_adapter("ref")
    same(model, expected)


@operation(SEVERAL, "`base_model.set_adapter([…])`: they act together, each at its own coefficient")
def _(_folder):
    model = adapted()
    model.add_adapter("second", config("q_proj"))
    model.base_model.set_adapter(["default", "second"])
    with steer(model, 0.0, adapter_name="default"), steer(model, 0.0, adapter_name="second"):
        same(model, base())


@operation(SEVERAL, "`base_model.set_adapter` of an adapter that is not there")
def _(_folder):
    model = adapted()
    refused_whole(model, lambda: model.base_model.set_adapter("defualt"))


@operation(SEVERAL, "`base_model.set_adapter` of one adapter twice")
def _(_folder):
    adapted().base_model.set_adapter(["default", "default"])


@operation(SEVERAL, "`PeftModel.set_adapter([…])`")
def _(_folder):
    adapted().set_adapter(["default"])


@operation(SEVERAL, "`add_weighted_adapter`")
def _(_folder):
    adapted().add_weighted_adapter(["default"], [0.5], "half")


@operation(SEVERAL, "`adapter_names=` in a forward pass or in `generate`")
def _(_folder):
    adapted()(input_ids=IDS, adapter_names=["default"])


@operation(SEVERAL, "an adapter of this method and one of another method in one `PeftModel`")
def _(_folder):
    adapted().add_adapter("lora", LoraConfig(target_modules=["k_proj"]))


@operation(MERGE, "`merge_adapter` twice, `unmerge_adapter` twice")
def _(_folder):
    model = adapted("q_proj", "down_proj")
    with steer(model, -1.0), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT tells that nothing is left to do
        expected = logits(model)
        for _time in range(2):
            model.merge_adapter()
        same(model, expected)
        for _time in range(2):
            model.unmerge_adapter()
    same(model, adapted("q_proj", "down_proj"))


@operation(MERGE, "`merge_and_unload`; with `residual`")
def _(_folder):
    model = adapted("q_proj")
    expected = logits(model)
    same(model.merge_and_unload(), expected)
    model = adapted()
    refused_whole(model, lambda: model.merge_and_unload())


@operation(MERGE, "`merge_and_unload(adapter_names=…)` of an adapter that is not there")
def _(_folder):
    model = adapted("q_proj")
    refused_whole(model, lambda: model.merge_and_unload(adapter_names=["defualt"]))


@operation(MERGE, "`delete_adapter` of an adapter that is merged")
def _(_folder):
    model = adapted("q_proj")
    model.merge_adapter()
    model.delete_adapter("default")


@operation(MERGE, "`convert_to_lora`; with `residual`")
def _(_folder):
    convert_to_lora(adapted("q_proj"), rank=4)
    convert_to_lora(adapted(), rank=4)


@operation(USE, "`disable_adapter`, nested too")
def _(_folder):
    model = adapted()
    with model.disable_adapter():
        with model.disable_adapter():
            same(model, base())
        same(model, base())
    differ(model, base())


@operation(USE, "`get_layer_status`, `get_model_status`, `get_nb_trainable_parameters`")
def _(_folder):
    model = adapted()
    assert [layer.module_type for layer in model.get_layer_status()] == ["Linear", "Residual"]
    status = model.get_model_status()
    assert status.peft_types == {"default": "SVD_STEERING"} and status.enabled is True
    assert model.get_nb_trainable_parameters()[0] == 6 + 4 + 6 + 32


@operation(USE, "`requires_grad` of adapters: `set_requires_grad`, `inference_mode`, `set_adapter`")
def _(_folder):
    model = adapted()
    model.add_adapter("second", config())
    assert trained(model) == {"default"}
    model.set_adapter("second")
    assert trained(model) == {"second"}
    model.set_requires_grad("second", False)
    assert trained(model) == set()
    model.set_adapter("default", inference_mode=True)
    assert trained(model) == set() == trained(adapted(inference_mode=True))


@operation(USE, "gradient checkpointing, `prepare_model_for_kbit_training`")
def _(_folder):
    gradients = []
    for prepare in (lambda model: model, prepare_model_for_kbit_training):
        torch.manual_seed(1)
        model = get_peft_model(prepare(base()), config())
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.constant_(parameter, 0.02)
        model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.any() and torch.allclose(plain, checkpointed, atol=1e-5)


def table() -> str:
    """The tables of all chapters, in Markdown."""
    lines: list[str] = []
    for chapter in dict.fromkeys(o.chapter for o in OPERATIONS):
        lines += [f"## {chapter}", "", "| operation | outcome |", "|---|---|"]
        for one in (o for o in OPERATIONS if o.chapter == chapter):
            folder = Path(tempfile.mkdtemp())
            lines.append(one.row(folder))
            shutil.rmtree(folder)
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    introduction = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), maxsplit=1, flags=re.MULTILINE)[0]
    PAGE.write_text(introduction + table(), encoding="utf-8")
