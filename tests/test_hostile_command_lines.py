"""Command lines that cannot be meant: each is refused in a sentence, before weights are loaded."""

import shutil

import pytest
from hostile import PAIR, repeng, train
from peft import get_peft_model

from repeng import SvdSteeringConfig, tiny

CPU = ["--use_cpu", "true"]
TINY = ["--config", "tiny", "--output_dir", "out", *CPU]
REFUSED = {
    "not a number": ("r", [*TINY, "--r", "four"]),
    "float for int": ("max_steps", [*TINY, "--max_steps", "1.5"]),
    "unknown choice": ("adapter", [*TINY, "--adapter", "lroa"]),
    "no value": ("r", [*TINY, "--r"]),
    "no value before another": ("r", [*TINY, "--r", "--seed", "3"]),
    "empty value": ("r", [*TINY, "--r", ""]),
    "empty value behind an equals sign": ("r", [*TINY, "--r="]),
    "bool not a bool": ("resume", [*TINY, "--resume", "perhaps"]),
    "nan rank": ("r", [*TINY, "--r", "nan"]),
    "comma for a point": ("learning_rate", [*TINY, "--learning_rate", "0,001"]),
    "nan learning rate": ("learning_rate", [*TINY, "--learning_rate", "nan"]),
    "negative learning rate": ("learning_rate", [*TINY, "--learning_rate", "-0.001"]),
    "inf separation": ("separation_target", [*TINY, "--separation_target", "inf"]),
    "huge": ("learning_rate", [*TINY, "--learning_rate=1e30"]),
    "stray word": ("stray", [*TINY, "--r", "4", "stray"]),
    "stray word before": ("stray", ["stray", *TINY]),
    "word behind a switch": ("stray", [*TINY, "--resume", "true", "stray"]),
    "single hyphen": ("-r", [*TINY, "--seed", "3", "-r", "4"]),
    "two hyphens alone": ("--", [*TINY, "--seed", "3", "--"]),
    "abbreviation": ("max_steps", [*TINY, "--max_step", "3"]),
    "short abbreviation": ("outp", [*TINY, "--outp", "a"]),
    "upper case": ("R", [*TINY, "--R", "4"]),
    "unknown key": ("learning_rate", [*TINY, "--learning_rat", "1"]),
    "unknown key, far": ("zzzzzz", [*TINY, "--zzzzzz", "1"]),
    "no_ of a key that is off": ("no_resume", [*TINY, "--no_resume"]),
    "no_ with a value": ("no_dataloader_drop_last", [*TINY, "--no_dataloader_drop_last", "true"]),
    "no_ of what must stay": ("dataloader_drop_last", [*TINY, "--no_dataloader_drop_last"]),
    "lone surrogate in a path": ("output_dir", [*TINY, "--output_dir", "a\udcff"]),
    "lone surrogate in a word": ("positive", [*TINY, "--positive", "\ud800"]),
    "surrogate in a configuration": ("config", ["--config", "a\udcff"]),
    "output under a file": ("output_dir", [*TINY, "--output_dir", "file/out"]),
    "output is a file": ("output_dir", [*TINY, "--output_dir", "file"]),
    "output is a link to a file": ("output_dir", [*TINY, "--output_dir", "link"]),
    "output is a link to nothing": ("output_dir", [*TINY, "--output_dir", "lost"]),
    "local rank of nobody": ("local_rank", [*TINY, "--local_rank", "5"]),
    "local rank with a hyphen": ("local_rank", [*TINY, "--local-rank=0"]),
    "configuration without a name": ("config", ["--config"]),
    "empty configuration": ("config", ["--config", ""]),
    "configuration that is not there": ("mood", ["--config", "moood"]),
    "configuration is a folder": ("folder", ["--config", "folder"]),
    "configuration is a link to itself": ("loop", ["--config", "loop"]),
    "configuration with a long name": ("config", ["--config", "x" * 5000]),
    "two words for one": ("positive", [*TINY, "--positive", "honest", "truthful"]),
    "one word of two": ("negative", ["--positive", "honest", *CPU]),
    "pairs beside words": ("pairs_file", [*TINY, "--pairs_file", "p.jsonl"]),
    "no task": ("positive", ["--model_name_or_path", "tiny", *CPU]),
}
TAKEN = {
    "hyphens": [*TINY, "--max-steps", "3", "--learning-rate=1e-3"],
    "equals sign": [*TINY, "--r=4", "--positive=honest"],
    "twice": [*TINY, "--r", "4", "--r", "8"],
    "switch": [*TINY, "--resume"],
    "yes": [*TINY, "--resume", "yes", "--require_steering", "No"],
    "several": [*TINY, "--layers", "1", "2", "--target_modules", "q_proj", "v_proj"],
    "two configurations": ["--config", "tiny", "more.yaml", *CPU],
    "configurations apart": ["--config", "tiny", "--config", "more.yaml", *CPU],
    "no words": CPU,
    "objects": [*TINY, "--lr_scheduler_kwargs", '{"num_cycles": 0.5}'],
    "umlauts": [*TINY, "--output_dir", "ö ü"],
    "negative number": [*TINY, "--max_steps", "-1"],
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The folder of a small adapter, with the configuration that training writes beside it."""
    config = SvdSteeringConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], init_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(tiny.load()[0], config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(adapter, tmp_path):
    (tmp_path / "file").write_text("kept\n")
    (tmp_path / "more.yaml").write_text("r: 4\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "lost").symlink_to("nowhere/deep")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "p.jsonl").write_text(PAIR * 20)
    (tmp_path / "text.safetensors").write_text("no tensors at all\n")
    (tmp_path / "text.txt").write_text("words\n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "config.yaml").write_text("positive: honest\nnegative: dishonest\nr: 4\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{}")
    (tmp_path / "broken" / "config.yaml").write_text("positive: [honest\n")
    return tmp_path


@pytest.mark.parametrize("name", REFUSED)
def test_a_line_of_the_training_is_refused(name, folder):
    word, argv = REFUSED[name]
    found = train(argv, folder)
    assert found.faults(word) == [] and len(found.message) < 700, found


@pytest.mark.parametrize("name", TAKEN)
def test_a_line_in_other_words_is_taken(name, folder):
    found = train(TAKEN[name], folder)
    assert found.accepted, found


WORDS = ["--positive", "honest", "--negative", "dishonest", "--use_cpu", "true"]
COMMANDS = {
    "nothing": ("evaluate", []),
    "unknown command": ("evaluate", ["evalute", "adapter"]),
    "unknown command, far": ("evaluate", ["zzz"]),
    "command in capitals": ("evaluate", ["Evaluate", "adapter"]),
    "a key for a command": ("evaluate", ["--nats", "1"]),
    "empty command": ("evaluate", [""]),
    "no path": ("PATH", ["evaluate"]),
    "no path before keys": ("PATH", ["calibrate", "--nats"]),
    "path absent": ("nowhere", ["evaluate", "nowhere", *WORDS]),
    "path empty": ("PATH", ["evaluate", "", *WORDS]),
    "path too long": ("PATH", ["evaluate", "x" * 5000, *WORDS]),
    "path with NUL": ("PATH", ["evaluate", "a\0b", *WORDS]),
    "path an empty folder": ("folder", ["evaluate", "folder", *WORDS]),
    "path a text file": ("text.txt", ["calibrate", "text.txt", *WORDS]),
    "path an image": ("image.png", ["evaluate", "image.png", *WORDS]),
    "path a model folder": ("model", ["evaluate", "model", *WORDS]),
    "two paths": ("model", ["evaluate", "adapter", "model", *WORDS]),
    "link to nothing": ("lost", ["evaluate", "lost", *WORDS]),
    "config broken": ("config.yaml", ["evaluate", "broken"]),
    "nats for evaluate": ("nats", ["evaluate", "adapter", "--nats", "1"]),
    "nats inf": ("nats", ["calibrate", "adapter", "--nats", "inf"]),
    "nats huge": ("nats", ["calibrate", "adapter", "--nats", "1e30"]),
    "nats tiny": ("nats", ["calibrate", "adapter", "--nats", "1e-30"]),
    "nats negative": ("nats", ["calibrate", "adapter", "--nats", "-1"]),
    "nats nan": ("nats", ["calibrate", "adapter", "--nats", "nan"]),
    "nats a word": ("nats", ["calibrate", "adapter", "--nats", "many"]),
    "nats without a value": ("nats", ["calibrate", "adapter", "--nats"]),
    "percentile 100": ("percentile", ["calibrate", "adapter", "--percentile", "100"]),
    "percentile 0": ("percentile", ["calibrate", "adapter", "--percentile", "0"]),
    "sequences 0": ("sequences", ["calibrate", "adapter", "--sequences", "0"]),
    "sequences half": ("sequences", ["calibrate", "adapter", "--sequences", "1.5"]),
    "sequences huge": ("sequences", ["calibrate", "adapter", "--sequences", "1000000000"]),
    "seed": ("seed", ["evaluate", "adapter", "--seed", "-1"]),
    "require perhaps": ("require_steering", ["evaluate", "adapter", "--require_steering", "perhaps"]),
    "output is a file": ("output", ["evaluate", "adapter", *WORDS, "--output", "file"]),
    "output below a file": ("output", ["evaluate", "adapter", *WORDS, "--output", "file/out"]),
    "output empty": ("output", ["evaluate", "adapter", *WORDS, "--output", ""]),
    "output nowhere": ("output", ["evaluate", "adapter", *WORDS, "--output", "/proc/nowhere"]),
    "key of training": ("learning_rate", ["evaluate", "adapter", "--learning_rate", "1"]),
    "abbreviation": ("questions_file", ["evaluate", "adapter", "--question", "q"]),
    "model absent": ("model_name_or_path", ["evaluate", "adapter", "--model_name_or_path", "no/such"]),
    "model is a text": ("model_name_or_path", ["evaluate", "adapter", "--model_name_or_path", "text.txt"]),
    "model without layers": ("model_name_or_path", ["evaluate", "adapter", "--model_name_or_path", "model"]),
    "precision without 4 bits": ("bf16", ["evaluate", "adapter", *WORDS, "--bf16", "true"]),
    "configuration absent": ("moood", ["evaluate", "adapter", "--config", "moood"]),
    "same words": ("positive", ["evaluate", "adapter", "--positive", "a", "--negative", "a"]),
    "train: unknown key": ("learning_rate", ["train", *TINY, "--learning_rat", "1"]),
    "train: not a number": ("max_steps", ["train", *TINY, "--max_steps", "many"]),
    "train: launcher's number": ("num_processes", ["train", *TINY, "--num_processes", "two"]),
    "train: launcher's file": ("config_file", ["train", *TINY, "--config_file", "nowhere.yaml"]),
    "train: abbreviation": ("num_processes", ["train", *TINY, "--num_proc", "2"]),
    "train: stray word": ("stray", ["train", "stray", *TINY]),
    "train: ignored": ("fp16", ["train", *TINY, "--fp16", "true"]),
    "train: configuration": ("file", ["train", "--config", "file"]),
    "export: no form": ("--to", ["export", "adapter"]),
    "export: unknown form": ("ggfu", ["export", "adapter", "--to", "ggfu"]),
    "export: path absent": ("nowhere", ["export", "nowhere", "--to", "lora"]),
    "export: model folder": ("model", ["export", "model", "--to", "lora"]),
    "export: a word for a number": ("coefficients", ["export", "adapter", "--to", "lora", "--coefficients", "x"]),
    "export: nan": ("coefficients", ["export", "adapter", "--to", "lora", "--coefficients", "nan"]),
    "export: output below a file": ("output", ["export", "adapter", "--to", "lora", "--output", "file/x"]),
    "serve: no path": ("PATH", ["serve"]),
    "serve: path absent": ("nowhere", ["serve", "nowhere"]),
    "serve: port": ("port", ["serve", "adapter", "--port", "many"]),
    "serve: port too high": ("port", ["serve", "adapter", "--port", "70000"]),
    "serve: port negative": ("port", ["serve", "adapter", "--port", "-1"]),
    "chat: no path": ("PATH", ["chat"]),
    "chat: path absent": ("nowhere", ["chat", "nowhere"]),
    "chat: port without the page": ("port", ["chat", "adapter", "--port", "1"]),
    "chat: temperature": ("temperature", ["chat", "adapter", "--temperature", "hot"]),
    "chat: abbreviation": ("max_new_tokens", ["chat", "adapter", "--max_new", "5"]),
    "serve: abbreviation": ("max_length", ["serve", "adapter", "--max_len", "5"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_refused(name, folder):
    word, argv = COMMANDS[name]
    found = repeng(argv, folder)
    assert found.faults(word) == [] and len(found.message) < 900, found


@pytest.mark.parametrize(
    "argv",
    [
        ["evaluate", "adapter"],
        ["evaluate", "adapter", "--seed", "3", "--use-cpu"],
        ["evaluate", "--use_cpu", "adapter"],
        ["calibrate", "adapter", "--nats=0.5", *WORDS],
        ["train", *TINY, "--num_processes", "1"],
    ],
)
def test_a_command_in_other_words_is_taken(argv, folder):
    assert repeng(argv, folder).accepted
