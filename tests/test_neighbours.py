"""The same directions and files as vgel/repeng 0.4.0 and steering-vectors, in an environment of their own."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from repeng import SteeringVector, extract, tiny
from repeng.model.sites import capture
from repeng.model.tokens import encode
from repeng.vectors.directions import METHODS

pytestmark = pytest.mark.index
WEIGHTS = Path(tiny.__file__).parent / "weights"

THEIRS = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from repeng import ControlVector, DatasetEntry
from safetensors.numpy import save_file
from steering_vectors import train_steering_vector
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

folder, weights = map(Path, sys.argv[1:])
model = AutoModelForCausalLM.from_pretrained(weights, torch_dtype=torch.float32).eval()
special = json.loads((folder / "special.json").read_text())
tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(weights / "tokenizer.json"), padding_side="right", **special)
texts = json.loads((folder / "texts.json").read_text())
ids = [tokenizer(text)["input_ids"] for pair in texts for text in pair]
assert ids == json.loads((folder / "ids.json").read_text())
found = {}
for method in ("pca_diff", "pca_center"):
    made = ControlVector.train(model, tokenizer, [DatasetEntry(*pair) for pair in texts], method=method, batch_size=7)
    made.export_gguf(str(folder / f"{method}.gguf"))
    found.update({f"{method}.{layer}": direction for layer, direction in made.directions.items()})
mean = train_steering_vector(model, tokenizer, [tuple(pair) for pair in texts], batch_size=5)
found.update({f"mean.{layer}": direction.numpy() for layer, direction in mean.layer_activations.items()})
ours = ControlVector.import_gguf(str(folder / "ours.gguf"))
assert ours.model_type == "mistral", ours.model_type
found.update({f"ours.{layer}": np.array(direction) for layer, direction in ours.directions.items()})
save_file({key: np.ascontiguousarray(value) for key, value in found.items()}, folder / "theirs.safetensors")
"""


def text_of(pair, side):
    return f"{getattr(pair, side)} {pair.suffix}"


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory, embedded):
    """Directions that the neighbours make of the same pairs, and what they read from our GGUF file."""
    model, tokenizer = embedded
    folder = tmp_path_factory.mktemp("neighbours")
    pairs = tiny.pairs("honesty", 60, 0)
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    (folder / "special.json").write_text(json.dumps({name: token for name, token in special.items() if token}))
    texts = [[text_of(pair, side) for side in ("chosen", "rejected")] for pair in pairs]
    (folder / "texts.json").write_text(json.dumps(texts))
    ids = [encode(tokenizer, getattr(p, side), p.suffix).ids for p in pairs for side in ("chosen", "rejected")]
    (folder / "ids.json").write_text(json.dumps(ids))
    ours = extract(model, tokenizer, pairs, layers=[1, 2, 5])
    ours.save_gguf(folder / "ours.gguf")
    uv = shutil.which("uv") or pytest.skip("uv is not installed")
    packages = ["repeng==0.4.0", "steering-vectors==0.12.2"]
    command = [uv, "run", "--isolated", "--no-project", *(word for name in packages for word in ("--with", name))]
    probe = subprocess.run([*command, "python", "-c", ""], capture_output=True, text=True, timeout=600, cwd=folder)
    if probe.returncode:
        pytest.skip(f"no environment for the neighbours: {probe.stderr[-300:]}")
    script = folder / "theirs.py"
    script.write_text(THEIRS)
    subprocess.run([*command, "python", str(script), str(folder), str(WEIGHTS)], check=True, timeout=600, cwd=folder)
    return folder, pairs, ours, load_file(folder / "theirs.safetensors")


@pytest.mark.filterwarnings("ignore:held-out accuracy below:UserWarning")
@pytest.mark.parametrize(
    "method, theirs", [("pca_diff", "pca_diff"), ("pca_center", "pca_center"), ("mean_diff", "mean")]
)
def test_directions_are_those_of_the_neighbours(embedded, exchanged, method, theirs):
    _, pairs, _, found = exchanged
    layers = sorted(int(key.split(".")[1]) for key in found if key.startswith(f"{theirs}."))
    assert layers == list(range(0 if theirs == "mean" else 1, 6))
    vector = extract(*embedded, pairs, layers=layers, method=method)
    for layer in layers:
        other = found[f"{theirs}.{layer}"]
        ours = vector[layer]
        if layer == 5 and theirs != "mean":
            # repeng reads hidden_states[-1], which is behind the final norm, and yet steers before it. Half of the
            # pairs are on either side there, so that its vote on the sign and our mean may differ.
            ours = METHODS[method](*normed(*embedded, pairs))
            ours = ours * (ours @ other).sign()
        cosine = torch.nn.functional.cosine_similarity(ours, other, dim=0)
        assert cosine >= 0.999, (layer, cosine)
        if theirs == "mean":
            assert torch.allclose(ours, other, atol=1e-3)


def normed(model, tokenizer, pairs):
    """The last token's states behind the final norm, of both sides, one prompt at a time."""
    sides = []
    for side in ("chosen", "rejected"):
        rows = []
        for pair in pairs:
            with capture([model.model.norm]) as outputs, torch.no_grad():
                model(torch.tensor([encode(tokenizer, getattr(pair, side), pair.suffix).ids]))
            rows.append(outputs[0][0, -1])
        sides.append(torch.stack(rows))
    return sides


def test_gguf_files_are_exchanged_both_ways(exchanged):
    folder, _, ours, found = exchanged
    for method in ("pca_diff", "pca_center"):
        read = SteeringVector.load_gguf(folder / f"{method}.gguf")
        assert read.layers == [1, 2, 3, 4, 5] and read.metadata["model_hint"] == "mistral"
        for layer in read.layers:
            assert torch.equal(read[layer], found[f"{method}.{layer}"])
    for layer in ours.layers:
        assert torch.equal(ours[layer], found[f"ours.{layer}"])
