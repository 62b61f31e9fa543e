"""Arithmetic and files of steering vectors."""

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import save_file

from repeng import SteeringVector, extract, steer, tiny


def vector(seed=0, places=(("residual", 1), ("residual", 3), ("up_proj", 3)), **metadata):
    generator = torch.Generator().manual_seed(seed)
    widths = {"residual": 128, "up_proj": tiny.load()[0].config.intermediate_size}
    return SteeringVector({p: torch.randn(widths[p[0]], generator=generator) for p in places}, metadata)


def test_arithmetic():
    a, b = vector(0), vector(1)
    for place in a.directions:
        assert torch.equal((a + b)[place], a[place] + b[place])
        assert torch.equal((a - b)[place], a[place] - b[place])
        assert torch.equal((2 * a)[place], 2 * a[place]) and torch.equal((a * 2)[place], 2 * a[place])
        assert torch.allclose((a / 4)[place], a[place] / 4) and torch.equal((-a)[place], -a[place])
        assert a.norm()[place] == pytest.approx(a[place].norm().item())
        assert a.normalize()[place].norm().item() == pytest.approx(1.0)
    assert a == vector(0) and a != b and a != a.select(layers=[1]) and a - a == b - b
    union = a.select(layers=[1]) + b.select(sites=["up_proj"])
    assert set(union.directions) == {("residual", 1), ("up_proj", 3)}
    for nonsense in (lambda: a + 1, lambda: a * b, lambda: a / "x", lambda: a - 1):
        with pytest.raises(TypeError):
            nonsense()


def test_access_by_place_and_by_layer():
    a = vector()
    assert a.sites == ["residual", "up_proj"] and a.layers == [1, 3]
    residual = a.select(sites=["residual"])
    assert torch.equal(residual[3], a["residual", 3])
    for missing in (1, ("up_proj", 1)):
        with pytest.raises(KeyError, match="residual"):
            a[missing]
    with pytest.raises(ValueError, match=r"nothing is left.*\[1, 3\]"):
        a.select(layers=[2])


def test_vectors_of_different_models_are_not_added():
    with pytest.raises(ValueError, match="mistral and llama"):
        vector(model_type="mistral") + vector(model_type="llama")
    with pytest.raises(ValueError, match="widths 128 and 64"):
        vector() + SteeringVector({("residual", 1): torch.zeros(64)})


def test_files_hold_everything(embedded, tmp_path):
    model, tokenizer = embedded
    made = extract(model, tokenizer, tiny.pairs("mood", 30, 0), layers=[2, 3], sites=["residual", "k_proj"], tokens=2)
    made.save(tmp_path / "deep" / "mood.safetensors")
    again = SteeringVector.load(tmp_path / "deep" / "mood.safetensors")
    assert again == made and again.metadata == made.metadata
    assert again.metadata["model_type"] == "mistral" and set(again.metadata["accuracy"]) >= {"2.residual", "3.k_proj"}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["mood.safetensors"]


def test_metadata_tell_no_more_than_is_true():
    known = {"accuracy": {"1.residual": 0.9, "3.residual": 0.8, "3.up_proj": 0.7}, "read": ["x"], "method": "svd"}
    made = vector(**known)
    assert made.select(layers=[1]).metadata["accuracy"] == {"1.residual": 0.9}
    assert "accuracy" not in (-made).metadata and (2 * made).metadata == known
    drawn = made.random_like(0)
    assert drawn.metadata == {"method": "random"} and drawn.norm() == pytest.approx(made.norm())
    (2 * made).metadata["note"] = made.normalize().metadata["note"] = "n"
    assert "note" not in made.metadata


def test_ordinary_input_can_be_saved(tmp_path):
    shared, path = torch.ones(4), tmp_path / "v.safetensors"
    made = SteeringVector({("residual", layer): shared for layer in (1, 2)}, {"k": np.int64(2), "format_version": 7})
    made.save(path)
    assert SteeringVector.load(path) == made and SteeringVector.load(path).metadata == {"k": 2, "format_version": 7}
    with pytest.raises(ValueError, match=r"JSON.*Tensor"):
        SteeringVector({("residual", 1): shared}, {"x": torch.ones(1)}).save(path)
    assert SteeringVector.load(path) == made
    zero = (made - made).normalize()
    assert not zero["residual", 1].any() and made[np.int64(2)] is made["residual", 2]
    assert np.float32(2.0) * made == made * 2


def test_a_multimodal_model_goes_by_its_text_model():
    model = tiny_models.build("gemma3-multimodal")
    made = SteeringVector({("residual", 1): torch.ones(tiny_models.WIDTH)}, {"model_type": "gemma3_text"})
    made.check(model)
    made.check(tiny_models.build("gemma3-text"))
    with pytest.raises(ValueError, match="no direction"), steer(model, 1.0, vector=SteeringVector()):
        pass


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "v.safetensors"
    vector(0).save(path)

    def half(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("repeng.vectors.vector.save_file", half)
    with pytest.raises(OSError, match="no space"):
        vector(1).save(path)
    assert SteeringVector.load(path) == vector(0) and len(list(tmp_path.iterdir())) == 1


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        SteeringVector.load(tmp_path / "absent.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="not a safetensors file"):
        SteeringVector.load(tmp_path / "text")
    save_file({"a": torch.ones(2)}, tmp_path / "plain")
    with pytest.raises(ValueError, match="no steering vector"):
        SteeringVector.load(tmp_path / "plain")
    save_file({"1.residual": torch.ones(2)}, tmp_path / "new", metadata={"repeng": '{"format_version": 2, "more": 1}'})
    with pytest.raises(ValueError, match=r"format 2.*newer"):
        SteeringVector.load(tmp_path / "new")


def test_another_model_is_refused(base):
    other = tiny_models.build("llama")
    with pytest.raises(ValueError, match=r"mistral.*llama"), steer(other, 1.0, vector=vector(model_type="mistral")):
        pass
    wide = vector(places=(("residual", 1),))
    with pytest.raises(ValueError, match=r"\(128,\).*32 wide"), steer(other, 1.0, vector=wide):
        pass
    with (
        pytest.raises(ValueError, match="layers 0 to 5"),
        steer(base, 1.0, vector=SteeringVector({("residual", 9): torch.ones(128)})),
    ):
        pass
    assert not any(m._forward_hooks for m in [*base.modules(), *other.modules()])


def test_gguf_control_vectors(tmp_path):
    pytest.importorskip("gguf")
    made = vector(places=(("residual", 1), ("residual", 3)), model_type="mistral")
    made.save_gguf(tmp_path / "v.gguf")
    again = SteeringVector.load_gguf(tmp_path / "v.gguf")
    assert again == made and again.metadata == {"model_hint": "mistral", "model_type": "mistral"}
    with pytest.raises(ValueError, match="up_proj"):
        vector(model_type="mistral").save_gguf(tmp_path / "w.gguf")
    with pytest.raises(ValueError, match="layer 0"):
        vector(places=(("residual", 0),), model_type="mistral").save_gguf(tmp_path / "w.gguf")
    with pytest.raises(ValueError, match="model type"):
        vector(places=(("residual", 1),)).save_gguf(tmp_path / "w.gguf")
    with pytest.raises(FileNotFoundError):
        SteeringVector.load_gguf(tmp_path / "w.gguf")


def test_a_control_vector_says_what_it_is_for(tmp_path):
    gguf = pytest.importorskip("gguf")
    made = vector(places=(("residual", 1), ("residual", 3)), model_type="mistral", model="/home/me/my-model")
    made.calibrated({"plus": 0.5, "minus": 2.0, "spent": {"plus": 1.0}}).save_gguf(tmp_path / "v.gguf")
    told = {key: field.contents() for key, field in gguf.GGUFReader(str(tmp_path / "v.gguf")).fields.items()}
    assert told["repeng.operation"] == "add" and told["repeng.layers"] == [1, 3]
    assert told["repeng.hook_point"] == "residual stream after the decoder layer"
    assert told["controlvector.model_hint"] == "mistral" and "/home" not in str(told)
    again = SteeringVector.load_gguf(tmp_path / "v.gguf")
    assert again == made and again.metadata == {
        "model_hint": "mistral",
        "model_type": "mistral",
        "model": "my-model",
        "calibration": {"plus": 0.5, "minus": 2.0},
    }
    assert again.model_name == "my-model" and vector(model="a/b").model_name == "a/b" and vector().model_name is None


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("repeng.operation", "ablate", "repeng.operation = 'ablate'; a control vector has 'add'"),
        ("repeng.hook_point", "mlp output", "repeng.hook_point"),
        ("repeng.layers", [1, 2], r"the layers \[1, 2\].*directions for \[1\]"),
        ("repeng.model", 7, "names its model"),
        ("repeng.calibration.plus", 0.5, "the calibration"),
        ("repeng.calibration.plus", {"plus": -0.5, "minus": 1.0}, "positive numbers"),
        ("repeng.calibration.plus", {"plus": float("inf"), "minus": 1.0}, "positive numbers"),
        ("repeng.other", "left aside", None),
        ("controlvector.other", "left aside", None),
    ],
)
def test_what_a_control_vector_says_is_checked(key, value, message, tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(tmp_path / "v.gguf"), "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    units = value if isinstance(value, dict) else {"plus": value} if isinstance(value, float) else {}
    for unit, number in units.items():
        writer.add_float64(f"repeng.calibration.{unit}", number)
    if not units:
        kinds = {str: writer.add_string, list: writer.add_array, int: writer.add_int32}
        kinds[type(value)](key, value)
    writer.add_tensor("direction.1", torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if message is None:
        assert SteeringVector.load_gguf(tmp_path / "v.gguf").metadata == {"model_hint": "llama"}
        return
    with pytest.raises(ValueError, match=message):
        SteeringVector.load_gguf(tmp_path / "v.gguf")


def test_other_gguf_files_are_refused(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_tensor("direction.1", torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="'llama', not a control vector"):
        SteeringVector.load_gguf(tmp_path / "m.gguf")


def test_without_the_package_gguf_the_way_to_get_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install .*gguf"):
        vector(places=(("residual", 1),), model_type="mistral").save_gguf(tmp_path / "v.gguf")
