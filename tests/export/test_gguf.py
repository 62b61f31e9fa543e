"""What is written for llama.cpp, applied as llama.cpp applies it and read back by transformers; see test_llama_cpp."""

import json
import re
from contextlib import nullcontext

import numpy as np
import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from support import randomise

import repeng
from repeng import SvdSteeringConfig, steer
from repeng.export import export_gguf, export_gguf_dial, export_merged
from repeng.model.loading import load_base

gguf = pytest.importorskip("gguf")
from tiny_gguf import write_base  # noqa: E402

IDS = torch.tensor([[5, 9, 33, 2, 7, 41], [8, 8, 3, 60, 12, 1]])
SVD = SvdSteeringConfig(r=4, target_modules=["residual-writers", "q_proj", "k_proj"], rotate_output=True)


def adapted(name="llama", config=SVD, size=0.3):
    model = get_peft_model(tiny_models.build(name), config).eval()
    randomise(model, size)
    return model


def logits(model, c=None):
    with torch.no_grad(), nullcontext() if c is None else steer(model, c):
        return model(IDS).logits


def tensors(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}


def told(path):
    return {key: field.contents() for key, field in gguf.GGUFReader(str(path)).fields.items()}


def served(name, folder, *loras):
    """The logits of a base whose GGUF file takes up LoRAs, pairs of a file and a scale, as llama.cpp applies them."""
    base, changed = folder / f"{name}.gguf", folder / "served.gguf"
    changed.unlink(missing_ok=True)
    write_base(tiny_models.build(name), base)
    write_base(tiny_models.build(name), changed)
    reader = gguf.GGUFReader(str(changed), "r+")
    weights = {tensor.name: tensor.data for tensor in reader.tensors}
    for path, scale in loras:
        alpha, read = told(path)["adapter.lora.alpha"], tensors(path)
        for key in (key for key in read if key.endswith(".lora_a")):
            a, b = (read[key.removesuffix("a") + part].data for part in "ab")
            weights[key.removesuffix(".lora_a")] += scale * alpha / b.shape[1] * (b @ a)
    reader.data.flush()
    return logits(load_base(str(changed)).eval())


def test_a_lora_has_the_names_and_shapes_of_llama_cpp(tmp_path):
    path = tmp_path / "a.gguf"
    assert export_gguf(adapted(), path) == [path]
    keys, read = told(path), tensors(path)
    assert (keys["general.type"], keys["adapter.type"], keys["general.architecture"]) == ("adapter", "lora", "llama")
    assert keys["adapter.lora.alpha"] == 4.0 and keys["repeng.coefficient"] == "1"
    parts = {name.removeprefix("blk.1.") for name in read if name.startswith("blk.1.")}
    sites = ("attn_q", "attn_k", "attn_output", "ffn_down")
    assert parts == {f"{site}.weight.lora_{factor}" for site in sites for factor in "ab"}
    assert read["blk.0.ffn_down.weight.lora_a"].data.shape == (4, 48)
    assert read["blk.0.ffn_down.weight.lora_b"].data.shape == (32, 4)
    assert all(tensor.tensor_type == gguf.GGMLQuantizationType.F32 for tensor in read.values())


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2"])
def test_a_lora_is_exact_at_its_coefficient(name, tmp_path):
    model = adapted(name)
    files = export_gguf(model, tmp_path / "several", [1.0, -0.5])
    assert [file.name for file in files] == ["c+1.gguf", "c-0.5.gguf"]
    for c, file in zip((1.0, -0.5), files, strict=True):
        assert torch.allclose(served(name, tmp_path, (file, 1.0)), logits(model, c), atol=1e-4)
    assert (logits(model, 1.0) - logits(model, 0.0)).abs().max() > 1
    assert torch.allclose(served(name, tmp_path), logits(model, 0.0), atol=1e-4)


def test_modules_of_several_ranks(tmp_path):
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["up_proj", "k_proj"], rank_pattern={"k_proj": 2})
    model = adapted(config=config)
    export_gguf(model, tmp_path / "a.gguf", -0.7)
    assert torch.allclose(served("llama", tmp_path, (tmp_path / "a.gguf", 1.0)), logits(model, -0.7), atol=1e-4)


@pytest.mark.parametrize("kind", ["svd", "lora"])
def test_a_dial_is_exact_at_its_ends(kind, tmp_path):
    config = SVD if kind == "svd" else LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    model, folder = adapted(config=config), tmp_path / "dial"
    parts = ["odd", "even"] if kind == "svd" else ["odd"]
    assert export_gguf_dial(model, folder) == [folder / f"{part}.gguf" for part in parts]
    scales = json.loads((folder / "dial.json").read_text())["scales"]
    assert [*scales] == parts == [path.stem for path in sorted(folder.glob("*.gguf"), reverse=True)]
    for c, error in ((1.0, 1e-4), (-1.0, 1e-4), (0.5, 1e-4 if kind == "lora" else 0.5)):
        loras = [(folder / f"{part}.gguf", {"c": c, "c * c": c * c}[scales[part]]) for part in parts]
        assert torch.allclose(served("llama", tmp_path, *loras), logits(model, c), atol=error)
    card = (folder / "README.md").read_text()
    files = " ".join(f"--lora {folder / part}.gguf" for part in parts)
    assert f"llama-server -m MODEL.gguf --lora-init-without-apply {files}\n" in card and "calibrated" not in card
    body = json.loads(re.search(r"```json\n(.*)\n```", card)[1])
    assert body["lora"] == [{"id": 0, "scale": 0.5}, {"id": 1, "scale": 0.25}][: len(parts)]


def test_a_calibrated_dial_says_its_units(tmp_path):
    model, folder = adapted(), tmp_path / "dial"
    model.base_model.set_units({"plus": 0.5, "minus": 2.0}, "default")
    export_gguf_dial(model, folder)
    assert json.loads((folder / "dial.json").read_text())["units"] == {"plus": 0.5, "minus": 2.0}
    card = (folder / "README.md").read_text()
    assert "a positive coefficient by 0.5 and a negative one by 2." in card
    assert '[{"id": 0, "scale": 0.25}, {"id": 1, "scale": 0.0625}]' in card
    for c, scale in ((2.0, 1.0), (-0.5, -1.0)):
        loras = [(folder / "odd.gguf", scale), (folder / "even.gguf", 1.0)]
        assert torch.allclose(served("llama", tmp_path, *loras), logits(model, c), atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_merged_file_is_the_bases_but_for_the_change(name, tmp_path):
    model, base, path = adapted(name), tmp_path / "base.gguf", tmp_path / "merged.gguf"
    write_base(tiny_models.build(name), base)
    assert export_merged(model, path, -0.5, base_file=base) == [path]
    assert torch.allclose(logits(load_base(str(path)).eval()), logits(model, -0.5), atol=0.01)
    own = {"GGUF.kv_count": len(told(base)) - 1, "repeng.coefficient": "-0.5", "repeng.version": repeng.__version__}
    assert told(path) == {**told(base), **own}
    kinds = [gguf.GGUFReader(str(file)).fields["repeng.test.numbers"].types for file in (base, path)]
    assert kinds[0] == kinds[1]
    before, after = tensors(base), tensors(path)
    assert [*before] == [*after]
    for key, tensor in before.items():
        changed = any(site in key for site in ("attn_q.w", "attn_k.w", "attn_output.w", "ffn_down.w"))
        assert after[key].tensor_type.name == ("F16" if changed else "F32")
        assert changed or np.array_equal(after[key].data, tensor.data)


def test_a_small_change_is_not_rounded_away(tmp_path):
    model, base, path = adapted(size=1e-3), tmp_path / "base.gguf", tmp_path / "merged.gguf"
    write_base(tiny_models.build("llama"), base)
    export_merged(model, path, 1.0, base_file=base)
    assert {tensor.tensor_type.name for tensor in tensors(path).values()} == {"F32"}
    assert torch.allclose(logits(load_base(str(path)).eval()), logits(model, 1.0), atol=1e-5)


def test_a_merged_file_needs_the_file_of_its_base(tmp_path):
    model, path = adapted(), tmp_path / "merged.gguf"
    with pytest.raises(ValueError, match=r"convert_hf_to_gguf\.py"):
        export_merged(model, path)
    other = tiny_models.build("llama")
    torch.nn.init.normal_(other.model.layers[1].self_attn.q_proj.weight)
    write_base(other, tmp_path / "other.gguf")
    with pytest.raises(ValueError, match=r"not the base of this model: blk\.1\.attn_q\.weight is another weight"):
        export_merged(model, path, base_file=tmp_path / "other.gguf")
    write_base(tiny_models.build("qwen2"), tmp_path / "qwen2.gguf")
    with pytest.raises(ValueError, match=r"is 'qwen2' and lacks the architecture 'llama'"):
        export_merged(model, path, base_file=tmp_path / "qwen2.gguf")
    writer = gguf.GGUFWriter(str(tmp_path / "lora.gguf"), "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.ones((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"lacks blk\.0\.attn_k\.weight, "):
        export_merged(model, path, base_file=tmp_path / "lora.gguf")
    assert not path.exists()


@pytest.mark.parametrize(
    "name, config, message",
    [
        ("neox", SvdSteeringConfig(r=4, target_modules=["query_key_value"]), "of a gpt_neox model"),
        ("llama-bias-tied", LoraConfig(r=2, target_modules=["lm_head"]), "tied to the embeddings"),
        ("gemma3-multimodal", LoraConfig(r=2, target_modules=["fc1"]), "vision_tower.*no name in a GGUF file"),
        ("llama", SvdSteeringConfig(r=4, target_modules="residual"), "rotates the residual stream"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings", "ignore:.*tied")
def test_what_has_no_place_there_is_named(name, config, message, tmp_path):
    model = adapted(name, config)
    for export in (export_gguf, export_gguf_dial):
        with pytest.raises(ValueError, match=message):
            export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_text_model_of_one_that_sees(tmp_path):
    config = SvdSteeringConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1])
    model = get_peft_model(tiny_models.build("gemma3-multimodal"), config)
    export_gguf(model, tmp_path / "a.gguf")
    assert told(tmp_path / "a.gguf")["general.architecture"] == "gemma3"
    assert [*tensors(tmp_path / "a.gguf")] == ["blk.1.attn_q.weight.lora_a", "blk.1.attn_q.weight.lora_b"]


def test_broken_weights_and_an_old_package_are_named(tmp_path, monkeypatch):
    model = adapted(size=float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        export_gguf(model, tmp_path / "a.gguf")
    assert not [*tmp_path.iterdir()]
    monkeypatch.setattr(gguf, "MODEL_ARCH_NAMES", {})
    with pytest.raises(ValueError, match="knows no 'llama'; install a newer one"):
        export_gguf(adapted(), tmp_path / "a.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install .*gguf"):
        export_gguf(adapted(), tmp_path / "a.gguf")


def test_nothing_is_written_over(tmp_path):
    model = adapted()
    (tmp_path / "a.gguf").write_text("mine")
    (tmp_path / "several").mkdir()
    (tmp_path / "several" / "c+1.gguf").write_text("mine")
    for write in (
        lambda: export_gguf(model, tmp_path / "a.gguf"),
        lambda: export_gguf(model, tmp_path / "several", [-1.0, 1.0]),
        lambda: export_gguf_dial(model, tmp_path / "several"),
        lambda: export_merged(model, tmp_path / "a.gguf", base_file=tmp_path / "a.gguf"),
    ):
        with pytest.raises(FileExistsError):
            write()
    assert (tmp_path / "a.gguf").read_text() == "mine" and len([*(tmp_path / "several").iterdir()]) == 1
