"""Vectors, adapters, reports and requests of strangers: read, or refused in one line; nothing that is not finite."""

import json
import struct

import pytest
import torch
from hostile_values import VALUES, as_json, damaged, read, rewritten
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from peft.utils import CONFIG_NAME
from safetensors.torch import save

from repeng import SteeringVector, SvdSteeringConfig, tiny
from repeng.control.adapter_folder import AdapterFolder
from repeng.eval.stored import load_reports
from repeng.serve.protocol import ChatCompletion, Refused, parse
from repeng.vectors.vector import KEY, read_vector

DIRECTION = torch.linspace(-1, 1, 8)
METADATA = {
    "method": "mean_diff",
    "model": "tiny",
    "model_type": "mistral",
    "pairs": 12,
    "tokens": "last",
    "accuracy": {"1.residual": 0.9},
    "calibration": {"plus": 2.0, "minus": 3.0},
    "read": [{"chosen": "a", "rejected": "b"}],
}
TENSORS = st.one_of(
    st.just(DIRECTION),
    st.sampled_from([DIRECTION.half(), DIRECTION.int(), DIRECTION.bool(), DIRECTION.reshape(2, 4), DIRECTION[:0]]),
    st.sampled_from([float("nan"), float("inf"), 1e38, 0.0]).map(lambda value: torch.full((8,), value)),
    st.sampled_from([torch.tensor(1.0), DIRECTION.to(torch.complex64), DIRECTION.double() * 1e300]),
)
NAMES = st.one_of(st.just("1.residual"), st.sampled_from(["residual", "1", "-1.residual", "1.", "x.y"]), st.text())
FILE = save({"1.residual": DIRECTION}, {KEY: json.dumps({"format_version": 1, "metadata": METADATA})})


@st.composite
def vector_files(draw):
    """A vector's file with damaged names, tensors, metadata or bytes."""
    if draw(st.booleans()):
        return draw(rewritten(FILE))
    tensors = draw(st.dictionaries(NAMES.filter(lambda n: "\0" not in n and n.isprintable()), TENSORS, max_size=3))
    metadata = draw(st.one_of(st.just(METADATA), damaged(METADATA), VALUES))
    told = draw(damaged({"format_version": 1, "metadata": metadata}))
    return save({name: tensor.clone() for name, tensor in tensors.items()}, {KEY: as_json(told)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("strangers")


@given(data=vector_files())
def test_vectors(folder, data):
    path = folder / "vector.safetensors"
    path.write_bytes(data)
    vector = read(read_vector, path)
    if vector is not None:
        assert all(d.dtype == torch.float32 and d.ndim == 1 and d.isfinite().all() for d in vector.directions.values())
        vector.describe()
        vector.save(folder / "again.safetensors")
        assert SteeringVector.load(folder / "again.safetensors").metadata == vector.metadata


def test_what_is_whole_is_read(folder, adapter, control_vector):
    """Else everything could be refused unnoticed."""
    path = folder / "whole.safetensors"
    path.write_bytes(FILE)
    assert read_vector(path).metadata == METADATA
    assert read_vector(folder / "whole.gguf").layers == [1]
    assert AdapterFolder.read(adapter[0]).config.r == 2


@pytest.fixture(scope="module")
def control_vector(folder):
    path = folder / "whole.gguf"
    SteeringVector({("residual", 1): DIRECTION}, {"model_type": "llama"}).save_gguf(path)
    return path.read_bytes()


@given(data=st.data())
def test_control_vectors(folder, control_vector, data):
    path = folder / "damaged.gguf"
    path.write_bytes(data.draw(rewritten(control_vector)))
    vector = read(read_vector, path)
    if vector is not None:
        assert all(d.isfinite().all() for d in vector.directions.values())


@pytest.mark.parametrize("count", [2**31, 2**62, 2**64 - 1])
@pytest.mark.parametrize("place", [8, 16])  # how many tensors, how many keys
def test_a_header_that_lies_about_its_length_is_refused_at_once(folder, control_vector, place, count):
    path = folder / "lies.gguf"
    path.write_bytes(control_vector[:place] + struct.pack("<Q", count) + control_vector[place + 8 :])
    assert read(read_vector, path) is None


@pytest.fixture(scope="module")
def adapter(folder):
    """The folder of an adapter, and what its configuration holds."""
    torch.manual_seed(0)
    config = SvdSteeringConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], init_weights=False)
    get_peft_model(tiny.load()[0], config).save_pretrained(folder / "adapter")
    return folder / "adapter", json.loads((folder / "adapter" / CONFIG_NAME).read_text())


@given(data=st.data())
def test_configurations_of_adapters(adapter, data):
    place, whole = adapter
    (place / CONFIG_NAME).write_text(as_json(data.draw(damaged(whole))))
    found = read(AdapterFolder.read, place)
    if found is not None:
        assert type(found.config.r) is int and found.config.r >= 2


@given(data=st.data())
def test_weights_of_adapters(adapter, data):
    place, whole = adapter
    (place / CONFIG_NAME).write_text(json.dumps(whole))
    path = place / "adapter_model.safetensors"
    kept = path.read_bytes()
    try:
        path.write_bytes(data.draw(rewritten(kept)))
        read(AdapterFolder.read, place)
    finally:
        path.write_bytes(kept)


@given(data=st.one_of(st.binary(max_size=60), rewritten(save({}, {"repeng-reports": "{}"}))))
def test_reports(folder, data):
    path = folder / "reports.safetensors"
    path.write_bytes(data)
    read(load_reports, path)


REQUEST = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hello"}],
    "steer": {"mood": 1.0},
    "max_tokens": 4,
    "temperature": 0.5,
    "stop": ["."],
    "seed": 1,
    "stream": False,
}


@given(text=st.one_of(damaged(REQUEST).map(as_json), VALUES.map(as_json), st.text(max_size=30)))
def test_requests(text):
    try:
        parse(ChatCompletion, text.encode("utf-8", "surrogatepass"))
    except Refused as refused:
        assert "\n" not in str(refused) and len(str(refused)) < 2000
