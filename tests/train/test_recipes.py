"""Every recipe for a real model: it parses, its pairs are sound, and one step runs on its class built tiny."""

import json

import pytest
import tiny_models
import torch
import transformers as tf
from accelerate import FullyShardedDataParallelPlugin
from launches import CONFIGS, launch_arguments, launch_environment
from support import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from repeng import check_pairs
from repeng.data import probes, task, word_questions
from repeng.data.files import load_texts
from repeng.data.pairs import make_pairs
from repeng.train.arguments import SteeringArguments, parse_arguments
from repeng.train.build import build
from repeng.train.sharding import check_parallelism
from repeng.train.trainer import SteeringTrainer

SUFFIXES = ROOT / "configs" / "data" / "suffixes.txt"
CLASSES = {
    "qwen3-0.6b": "qwen3",
    "qwen3-4b": "qwen3",
    "qwen3-14b": "qwen3",
    "qwen3-30b-a3b": "qwen3-moe",
    "gemma-3-270m": "gemma3-text",
    "gemma-3-1b": "gemma3-text",
    "gemma-3-4b": "gemma3-multimodal",
    "gemma-3-12b": "gemma3-multimodal",
    "llama-3.2-1b": "llama",
    "llama-3.1-8b": "llama",
    "smollm2-135m": "llama",
    "smollm2": "llama",
    "olmo-3-7b": "olmo3",
}
TRAITS = sorted((ROOT / "configs" / "traits").glob("*.yaml"))
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if path.stem != "tiny")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def chat_tokenizer():
    """Byte-level BPE of a small vocabulary, with a thinking template and no token for the beginning of a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(load_texts(SUFFIXES), trainer)
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_of(name, tokenizer):
    if CLASSES[name] == "olmo3":
        torch.manual_seed(0)
        model = tf.Olmo3ForCausalLM(
            tf.Olmo3Config(**tiny_models.SIZES, num_key_value_heads=2, sliding_window=8)
        ).eval()
    else:
        model = tiny_models.build(CLASSES[name])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = tokenizer.eos_token_id, 0
    return model.bfloat16()  # as the published weights are


def test_there_is_a_class_for_every_recipe():
    assert sorted(CLASSES) == RECIPES


def test_the_suffixes_are_what_the_script_writes():
    namespace = {}
    exec(
        compile((SUFFIXES.parent / "make_suffixes.py").read_text(encoding="utf-8"), "make_suffixes.py", "exec"),
        namespace,
    )
    lines = SUFFIXES.read_text(encoding="utf-8").splitlines()
    assert namespace["suffixes"]() == lines and len(lines) == len(set(lines)) >= 400
    assert not any(line.endswith((".", "!", "?")) for line in lines)


def test_accelerate_reads_its_configurations(monkeypatch):
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {"one_gpu", "ddp", "fsdp2", "zero2"}
    assert launch_arguments("one_gpu").num_processes == 1 and not launch_arguments("one_gpu").multi_gpu
    assert launch_arguments("ddp").multi_gpu and launch_arguments("ddp").num_processes > 1
    for key, value in launch_environment("fsdp2").items():
        monkeypatch.setenv(key, value)
    check_parallelism(SteeringArguments())
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward and launch_arguments("fsdp2").use_fsdp
    assert launch_arguments("zero2").use_deepspeed
    settings = json.loads((ROOT / launch_arguments("zero2").deepspeed_config_file).read_text())
    assert settings["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_of_a_recipe_names_files_that_are_there(name):
    command = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[1]
    words = command.removeprefix("# repeng train ").split()
    if words[0] == "--config_file":
        assert (CONFIGS / f"{words[1]}.yaml").is_file()
        words = words[2:]
    assert words[:2] == ["--config", name] and set(words[2:]) <= {path.stem for path in TRAITS}


def test_every_trait_makes_sound_pairs_for_a_chat_model(chat_tokenizer):
    assert len(TRAITS) >= 6
    for path in TRAITS:
        configs = ["--config", str(ROOT / "configs" / "qwen3-4b.yaml"), str(path)]
        args, _ = parse_arguments([*configs, "--bf16", "false"])
        assert args.model_name_or_path == "Qwen/Qwen3-4B" and len(set(args.templates)) >= 3
        pairs = make_pairs(
            args.positive,
            args.negative,
            templates=args.templates,
            suffixes=load_texts(SUFFIXES)[::40],
            tokenizer=chat_tokenizer,
            n=30,
            seed=0,
        )
        assert check_pairs(pairs, chat_tokenizer) == [] and len(pairs) == 30
        assert {p.chosen.replace(args.positive, "") for p in pairs} == {
            p.rejected.replace(args.negative, "") for p in pairs
        }


@pytest.mark.parametrize("name", RECIPES)
def test_one_step_of_the_recipe(name, chat_tokenizer, tmp_path, monkeypatch):
    model = tiny_of(name, chat_tokenizer)
    monkeypatch.chdir(tmp_path)  # nothing in a recipe depends on the folder in which it runs
    monkeypatch.setattr(task, "SAMPLED_TRAIN", 8)
    monkeypatch.setattr(task, "SAMPLED_TEST", 2)
    monkeypatch.setattr(word_questions, "TELLING", 0.0)  # the weights are drawn by chance: no word tells much
    monkeypatch.setattr(probes, "some_suffixes", lambda tokenizer: [])
    small = {
        "output_dir": tmp_path,
        "num_pairs": 20,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "use_cpu": "true",
        "save_strategy": "no",
        "disable_tqdm": "true",
        "r": 8,
        "warmup_steps": 0,
    }
    argv = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    task_args, args = parse_arguments(["--config", name, *argv])
    run = build(task_args, args, model=model, tokenizer=chat_tokenizer)
    pairs = run.task.pairs
    assert check_pairs(pairs, chat_tokenizer) == [] and 1 <= len(run.task.questions) <= 2
    begin = chat_tokenizer.decode(run.examples[0]["chosen_ids"])
    assert begin.startswith("<|im_start|>user\n") and (task_args.positive in begin)
    assert f"</think>\n\n{pairs[0].suffix}" in begin and begin.endswith(pairs[0].suffix)
    trainer = SteeringTrainer(run.model, args, run.examples, run.tokenizer)
    before = [p.detach().clone() for p in run.model.parameters() if p.requires_grad]
    trainer.train()
    after = [p for p in run.model.parameters() if p.requires_grad]
    assert all(p.isfinite().all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
