"""What a way of splitting the model over processes is refused for, before anything is loaded."""

import os

import pytest
from support import arguments, prepare

from repeng.model import loading
from repeng.train import build as building

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
REFUSED = {
    "FSDP1": ({**FSDP, "FSDP_VERSION": "1"}, {}, "fsdp_version: 2"),
    "one loads": ({**FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "fsdp_cpu_ram_efficient_loading"),
    "4 bits": (FSDP, {"load_in_4bit": "true"}, r"ddp\.yaml"),
}


def refuse(args, message, monkeypatch):
    monkeypatch.setattr(building, "load_tokenizer", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        prepare(args)


@pytest.mark.parametrize("name", REFUSED)
def test_sharding_that_cannot_work_is_refused(name, tmp_path, monkeypatch):
    environment, keys, message = REFUSED[name]
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    refuse(arguments(tmp_path, **keys), message, monkeypatch)
    assert os.environ["FSDP_VERSION"] == environment["FSDP_VERSION"]


def test_zero_3_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("repeng.train.sharding.is_deepspeed_zero3_enabled", lambda: True)
    refuse(arguments(tmp_path), r"ZeRO-3 .* ZeRO-2", monkeypatch)


def test_four_bits_without_their_library_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    args = arguments(tmp_path, load_in_4bit="true")
    with pytest.raises(ValueError, match="bnb"):
        prepare(args)
