"""Vectors in the files of other projects: EasySteer's GGUF is read, pickles are refused."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from repeng import SteeringVector, steer

gguf = pytest.importorskip("gguf")
ROWS = {0: np.arange(4, dtype=np.float32) + 1, 2: -np.arange(4, dtype=np.float32)}


def easysteer(path, directions=ROWS, method="diffmean", older=False, own=None, **told):
    """What `export_gguf` of ZJU-REAL/EasySteer writes: easysteer/extraction/result.py; `older`: steer/utils.py."""
    writer = gguf.GGUFWriter(str(path), "controlvector")
    writer.add_string("controlvector.model_hint", "qwen2.5")
    writer.add_string("controlvector.method", method)
    writer.add_uint32("controlvector.layer_count", len(directions))
    if older:
        writer.add_float32("controlvector.explained_variance.2", 0.5)
        writer.add_string("controlvector.token_pos", "-1")
    else:
        native = {"version": 1, "component": "hidden_states", "metadata": {"mapping": [["normalize", True]]}, **told}
        writer.add_string("controlvector.easysteer", json.dumps(native) if own is None else own)
    for layer, direction in directions.items():
        writer.add_tensor(f"direction.{layer}", direction)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("options", [{}, {"component": None}, {"older": True}], ids=str)
def test_easysteers_vectors_are_read(tmp_path, options):
    made = SteeringVector.load_gguf(easysteer(tmp_path / "v.gguf", **options))
    assert set(made.directions) == {("residual", 0), ("residual", 2)} and made.metadata == {"model_hint": "qwen2.5"}
    for layer, row in ROWS.items():
        assert made["residual", layer].dtype == torch.float32
        assert made["residual", layer].tolist() == row.tolist()  # neither sign nor length changes


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_widths_of_numbers_are_read(tmp_path, dtype):
    rows = {layer: row.astype(dtype) for layer, row in ROWS.items()}
    assert SteeringVector.load_gguf(easysteer(tmp_path / "v.gguf", rows))[2].tolist() == ROWS[2].tolist()


def test_easysteers_layer_is_the_output_of_that_decoder_layer(base, tmp_path):
    row = np.linspace(-1, 1, 128, dtype=np.float32)
    made = SteeringVector.load_gguf(easysteer(tmp_path / "v.gguf", {0: row}))
    seen = []
    hook = base.model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = torch.arange(3, 9)[None]
    with torch.no_grad(), steer(base, 0.0, vector=made):
        base(ids)
    with torch.no_grad(), steer(base, 2.0, vector=made):
        base(ids)
    hook.remove()
    assert torch.allclose(seen[1] - seen[0], 2 * torch.tensor(row).expand_as(seen[0]), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"component": "attention_heads"}, "'attention_heads'.*residual stream"),
        ({"component": "router_logits"}, "'router_logits'.*residual stream"),
        ({"method": "iti", "older": True}, "'attention_heads'"),
        ({"method": "iti", "component": None}, "'attention_heads'"),
        ({"version": 2}, "unknown version.*version 1"),
        ({"own": "{"}, "unknown version"),
        ({"own": "[]"}, "unknown version"),
        ({"directions": {1: np.ones((2, 4), dtype=np.float32)}}, "'direction.1' with 2 dimensions"),
        ({"directions": {1: np.ones(4, dtype=np.int32)}}, "as I32; F16, F32 and F64 are read"),
    ],
    ids=str,
)
def test_easysteers_other_files_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SteeringVector.load_gguf(easysteer(tmp_path / "v.gguf", **options))


def test_pickles_are_refused_and_the_way_to_convert_them_is_right(tmp_path):
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).half()  # extract/pref.py of hidden-directions
    path = tmp_path / "v_pref_x.pt"
    torch.save(rows, path)
    with pytest.raises(ValueError, match=r"is a pickle.*weights_only=True") as refused:
        SteeringVector.load(path)
    code = str(refused.value).partition("weights_only=True, and call ")[2]
    target = tmp_path / "vector.safetensors"
    names = {"rows": torch.load(path, weights_only=True), "SteeringVector": SteeringVector}
    exec(code.replace("'vector.safetensors'", repr(str(target))), names)
    made = SteeringVector.load(target)
    assert made.layers == [0, 1, 2] and all(torch.equal(made["residual", i], rows[i].float()) for i in range(3))
    (tmp_path / "v.pkl").write_bytes(pickle.dumps([1.0]))
    with pytest.raises(ValueError, match="is a pickle"):
        SteeringVector.load(tmp_path / "v.pkl")


def test_a_file_that_only_begins_like_a_pickle_is_read(tmp_path):
    path = tmp_path / "v.safetensors"
    for spaces in range(300):  # the first byte is of the header's length
        note = {"repeng": json.dumps({"format_version": 1, "metadata": {"note": " " * spaces}})}
        save_file({"1.residual": torch.ones(2)}, path, metadata=note)
        if path.read_bytes()[:1] == b"\x80":
            break
    assert path.read_bytes()[:1] == b"\x80" and SteeringVector.load(path).layers == [1]
