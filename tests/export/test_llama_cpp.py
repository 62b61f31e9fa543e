"""What is written for llama.cpp, read and run by llama.cpp itself on a real model, beside `steer` in transformers.

llama.cpp multiplies with activations of 8 bits, so that it differs from transformers before anything is steered. That
noise is measured in the same run, and is what every comparison is held to.
"""

import ctypes
import json
import re
import shlex
from contextlib import contextmanager

import numpy as np
import pytest
import tiny_models
import torch
from peft import get_peft_model
from support import randomise, strongly_turned

from repeng import SteeringVector, SvdSteeringConfig, load_model, steer
from repeng.export import export_gguf, export_gguf_dial, export_merged
from repeng.export import gguf as writing
from repeng.model.sources import find_source

gguf = pytest.importorskip("gguf")
from tiny_gguf import write_base  # noqa: E402

pytestmark = pytest.mark.llama_cpp

PROMPTS = [
    "The capital of France is",
    "I woke up this morning and felt",
    "The best way to learn a language is to",
    "She opened the letter, read it twice, and",
]
TOP = 40


SILENCE = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


class Struct(ctypes.Structure):
    """A struct of the C interface that is handed on unread, with room for every version's."""

    _fields_ = [("content", ctypes.c_uint8 * 1024)]


class Engine:
    """A GGUF model in llama.cpp, by the C interface in the shared library of xllamacpp."""

    def __init__(self, path, threads=1):
        library = pytest.importorskip("xllamacpp.xllamacpp").__file__
        self.lib = ctypes.CDLL(library)
        pointer, whole, text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p
        signatures = {
            "llama_model_default_params": (Struct, []),
            "llama_context_default_params": (Struct, []),
            "llama_model_load_from_file": (pointer, [text, Struct]),
            "llama_init_from_model": (pointer, [pointer, Struct]),
            "llama_set_n_threads": (None, [pointer, whole, whole]),
            "llama_get_memory": (pointer, [pointer]),
            "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
            "llama_batch_get_one": (Struct, [pointer, whole]),
            "llama_decode": (whole, [pointer, Struct]),
            "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [pointer, whole]),
            "llama_adapter_lora_init": (pointer, [pointer, text]),
            "llama_set_adapters_lora": (whole, [pointer, pointer, ctypes.c_size_t, pointer]),
            "llama_set_adapter_cvec": (whole, [pointer, pointer, ctypes.c_size_t, whole, whole, whole]),
            "llama_free": (None, [pointer]),
            "llama_model_free": (None, [pointer]),
        }
        for name, (result, given) in signatures.items():
            function = getattr(self.lib, name)
            function.restype, function.argtypes = result, given
        self.lib.llama_log_set(SILENCE, None)
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        assert self.model, f"llama.cpp does not load {path}"
        self.context = self.lib.llama_init_from_model(self.model, self.lib.llama_context_default_params())
        self.lib.llama_set_n_threads(self.context, threads, threads)

    def close(self):
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def lora(self, path):
        adapter = self.lib.llama_adapter_lora_init(self.model, str(path).encode())
        assert adapter, f"llama.cpp does not load {path}"
        return adapter

    @contextmanager
    def scaled(self, *loras):
        """LoRAs at their scales: pairs of what `lora` returned and a number."""
        adapters = (ctypes.c_void_p * len(loras))(*(adapter for adapter, _ in loras))
        scales = (ctypes.c_float * len(loras))(*(scale for _, scale in loras))
        assert self.lib.llama_set_adapters_lora(self.context, adapters, len(loras), scales) == 0
        yield
        self.lib.llama_set_adapters_lora(self.context, None, 0, None)

    @contextmanager
    def vector(self, path, scale, width, depth):
        """A control vector as `--control-vector-scaled` adds it: row N − 1 of the data is added after block N."""
        data = np.zeros((depth - 1, width), dtype=np.float32)
        for tensor in gguf.GGUFReader(str(path)).tensors:
            data[int(tensor.name.removeprefix("direction.")) - 1] = scale * tensor.data
        given = self.lib.llama_set_adapter_cvec(self.context, data.ctypes.data, data.size, width, 1, depth - 1)
        assert given == 0
        yield
        self.lib.llama_set_adapter_cvec(self.context, None, 0, width, 0, 0)

    def __call__(self, ids, vocabulary):
        """Log-probabilities of the token after `ids`."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        assert self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(tokens, len(ids))) == 0
        logits = np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, -1), (vocabulary,))
        return torch.tensor(logits).log_softmax(-1)


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2")


@pytest.fixture(scope="module")
def base_file():
    source = find_source("smollm2")
    return f"{source.path}/{source.gguf_file}"


@pytest.fixture(scope="module")
def engine(base_file):
    engine = Engine(base_file)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def adapted(smollm2):
    """Rotations so large that log-probabilities move by nats, and not alike in both directions."""
    model, _ = smollm2
    adapted = strongly_turned(model)
    yield adapted
    adapted.unload()


@pytest.fixture(scope="module")
def wanted(adapted, smollm2):
    """What steering gives in transformers, by coefficient."""
    known = {}
    for c in (0.0, 1.0, -1.0, 0.5, -0.5):
        with steer(adapted, c):
            known[c] = expected(adapted, smollm2[1])
    return known


@pytest.fixture(scope="module")
def noise(engine, smollm2, wanted):
    mean, largest = gap(read(engine, smollm2), wanted[0.0])
    print(f"\nllama.cpp without steering: mean difference {mean:.3f}, largest {largest:.3f} nats")
    return mean


@pytest.fixture(scope="module")
def dial(engine, adapted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "dial"
    return folder, [engine.lora(path) for path in export_gguf_dial(adapted, folder)]


def read(engine, smollm2):
    """The engine's log-probabilities for each prompt."""
    model, tokenizer = smollm2
    return [engine(tokenizer(prompt)["input_ids"], model.config.vocab_size) for prompt in PROMPTS]


@torch.no_grad()
def expected(model, tokenizer):
    return [model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1].log_softmax(-1) for prompt in PROMPTS]


def gap(found, wanted):
    """Mean and largest difference over the engine's top tokens."""
    pairs = zip(found, wanted, strict=True)
    differences = torch.stack([(one - other)[one.topk(TOP).indices].abs() for one, other in pairs])
    return differences.mean().item(), differences.max().item()


def said(what, found, wanted):
    """The mean difference, printed with the largest."""
    mean, largest = gap(found, wanted)
    print(f"{what}: mean difference {mean:.3f}, largest {largest:.3f} nats")
    return mean


def test_a_lora_is_what_steer_does(engine, smollm2, adapted, wanted, noise, tmp_path):
    loras = {c: engine.lora(path) for c, path in zip((1, -1), export_gguf(adapted, tmp_path, [1, -1]), strict=True)}
    for c, lora in loras.items():
        assert gap(wanted[c], wanted[0])[0] > 3
        with engine.scaled((lora, 1.0)):
            assert said(f"LoRA({c:+g})", read(engine, smollm2), wanted[c]) < 2 * noise
    with engine.scaled((loras[1], -1.0)):
        assert said("LoRA(+1) scaled by -1", read(engine, smollm2), wanted[-1]) > 5 * noise


@pytest.mark.parametrize("broken", ["order of rows", "alpha"])
def test_a_lora_that_is_wrong_is_seen(broken, engine, smollm2, adapted, wanted, noise, tmp_path, monkeypatch):
    if broken == "alpha":
        write = gguf.GGUFWriter.add_float32
        monkeypatch.setattr(gguf.GGUFWriter, "add_float32", lambda self, key, value: write(self, key, 1.5 * value))
    else:
        monkeypatch.setattr(writing.Names, "rows", lambda self, name, weight: weight)
    (path,) = export_gguf(adapted, tmp_path / "a.gguf")
    with engine.scaled((engine.lora(path), 1.0)):
        assert said(f"wrong {broken}", read(engine, smollm2), wanted[1]) > 4 * noise


def test_a_dial_is_what_steer_does(engine, smollm2, adapted, wanted, noise, dial, tmp_path):
    _, (odd, even) = dial
    one = engine.lora(*export_gguf(adapted, tmp_path / "a.gguf"))
    between = {"dial": 0.0, "scaled": 0.0}
    for c in (1.0, -1.0, 0.5, -0.5):
        with engine.scaled((odd, c), (even, c * c)):
            mean = said(f"dial at {c:+g}", read(engine, smollm2), wanted[c])
        if abs(c) == 1.0:
            assert mean < 2 * noise
        else:
            with engine.scaled((one, c)):
                between["scaled"] += said(f"LoRA(+1) scaled by {c:+g}", read(engine, smollm2), wanted[c])
            between["dial"] += mean
    # At +0.5 alone they are alike, as LoRA(+1) is exact at 0 and +1 too.
    assert between["dial"] < 0.75 * between["scaled"]


def test_a_request_as_in_the_card(base_file, smollm2, wanted, noise, dial):
    """The server of llama.cpp, started as the card says, answers requests of different coefficients."""
    xllamacpp = pytest.importorskip("xllamacpp")
    folder, _ = dial
    card = (folder / "README.md").read_text()
    flags = shlex.split(re.search(r"llama-server (.*)", card)[1])
    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel, options.warmup = base_file, 512, 1, False
    options.verbosity, options.cpuparams.n_threads, options.cpuparams_batch.n_threads = 0, 1, 1
    options.lora_init_without_apply = "--lora-init-without-apply" in flags
    loras = [flags[i + 1] for i, flag in enumerate(flags) if flag == "--lora"]
    adapters = []
    for path in loras:
        adapters.append(xllamacpp.CommonAdapterLoraInfo())
        adapters[-1].path, adapters[-1].scale = path, 0.0
    options.lora_adapters = adapters
    server = xllamacpp.Server(options)
    example = json.loads(re.search(r"```json\n(.*)\n```", card)[1])
    assert example["lora"] == [{"id": 0, "scale": 0.5}, {"id": 1, "scale": 0.25}]
    bodies = {0.5: example["lora"]}
    for c in (0.0, 1.0, -1.0):
        bodies[c] = [{"id": 0, "scale": c}, {"id": 1, "scale": c * c}]
    found = {c: [] for c in bodies}
    for i, prompt in enumerate(PROMPTS):
        for c, lora in bodies.items():
            asked = {"prompt": prompt, "lora": lora, "n_predict": 1, "n_probs": TOP, "temperature": 0.0}
            (choice,) = server.handle_completions(asked)["choices"]
            top = choice["logprobs"]["content"][0]["top_logprobs"]
            differences = [abs(token["logprob"] - wanted[c][i][token["id"]].item()) for token in top]
            found[c].append(sum(differences) / len(differences))
    for c, means in found.items():
        mean = sum(means) / len(means)
        print(f"server at {c:+g}: mean difference {mean:.3f} nats")
        assert mean < 2 * noise


def test_a_merged_file_is_what_steer_does(smollm2, adapted, wanted, noise, base_file, tmp_path):
    path, c = tmp_path / "merged.gguf", -1.0
    export_merged(adapted, path, c, base_file=base_file)
    engine = Engine(path)
    assert said(f"merged at {c:+g}", read(engine, smollm2), wanted[c]) < 2 * noise
    engine.close()
    plain, _ = load_model(str(path))
    rounding = said("the same file in transformers", expected(plain.eval(), smollm2[1]), wanted[c])
    assert rounding < 0.1 * noise


def test_a_control_vector_is_what_steer_does(engine, smollm2, adapted, wanted, noise, tmp_path):
    (model, tokenizer), generator = smollm2, torch.Generator().manual_seed(0)
    width, depth = model.config.hidden_size, model.config.num_hidden_layers
    drawn = {layer: torch.randn(width, generator=generator) for layer in (9, 10, 14)}
    vector = SteeringVector({("residual", layer): d for layer, d in drawn.items()}, {"model_type": "llama"})
    vector.save_gguf(tmp_path / "v.gguf")
    shifted = SteeringVector({("residual", layer + 1): d for layer, d in drawn.items()}, {"model_type": "llama"})
    shifted.save_gguf(tmp_path / "shifted.gguf")
    with steer(adapted, 0.0), steer(model, -0.7, vector=vector):
        given = expected(model, tokenizer)
    assert gap(given, wanted[0.0])[0] > 0.5
    with engine.vector(tmp_path / "v.gguf", -0.7, width, depth):
        assert said("control vector", read(engine, smollm2), given) < 2 * noise
    with engine.vector(tmp_path / "shifted.gguf", -0.7, width, depth):
        assert said("one layer off", read(engine, smollm2), given) > 3 * noise
    assert said("without it again", read(engine, smollm2), wanted[0.0]) < 2 * noise


SITES = {"gpt2": ["c_attn", "c_proj", "c_fc"], "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}
USUAL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CACHE = 0.01  # what keys and values of 16 bits do to a tiny model, with room


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama-bias-tied",
        "mistral-window",
        "qwen2",
        "qwen3",
        "smollm3",
        "olmo2",
        "gemma2",
        "gemma3-text",
        "phi3",
        "gpt2",
    ],
)
def test_every_architecture_has_its_order_of_rows(name, tmp_path):
    """On tiny models of float32 the engine's noise is thousandths of a nat."""
    config = SvdSteeringConfig(r=4, target_modules=SITES.get(name, USUAL), rotate_output=True)
    model, ids = get_peft_model(tiny_models.build(name), config).eval(), [5, 9, 33, 2, 7, 41]
    randomise(model, 0.2)

    @torch.no_grad()
    def probabilities(c):
        with steer(model, c):
            return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)

    base, merged = tmp_path / "base.gguf", tmp_path / "merged.gguf"
    write_base(tiny_models.build(name), base)
    engine = Engine(base)
    assert (engine(ids, tiny_models.VOCABULARY) - probabilities(0.0)).abs().max() < CACHE
    assert (probabilities(1.0) - probabilities(0.0)).abs().max() > 0.5
    odd, even = (engine.lora(path) for path in export_gguf_dial(model, tmp_path / "dial"))
    for c in (1.0, -1.0):
        with engine.scaled((odd, c), (even, c * c)):
            assert (engine(ids, tiny_models.VOCABULARY) - probabilities(c)).abs().max() < CACHE
    engine.close()
    export_merged(model, merged, 1.0, base_file=base)
    engine = Engine(merged)
    assert (engine(ids, tiny_models.VOCABULARY) - probabilities(1.0)).abs().max() < 3 * CACHE
    engine.close()
