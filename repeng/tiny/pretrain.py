"""Make the embedded language model: `python -m repeng.tiny.pretrain --seed 0 --output DIR`.

A decoder of the Mistral architecture with a sliding window of 16 words. Because of the window, information about the
persona has to travel in the residual stream, so a direction for the persona exists. Writes config, safetensors,
tokenizer and `manifest.json`.
"""

import argparse
import hashlib
import json
import platform
import random
import sys
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from repeng.model.tokens import special_id
from repeng.tiny.world import World, vocabulary

SEQUENCE_LENGTH = 64
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")


def _build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, with `<s>` in front. The tokenizer is the same for every seed of the world."""
    ids = {word: index for index, word in enumerate((*SPECIAL_TOKENS, *vocabulary()))}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", ids["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> MistralForCausalLM:
    """A model with about 1.3 M parameters, float32, initialised from `seed`."""
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        sliding_window=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
    )
    return MistralForCausalLM(config)


class Documents(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Documents of a world, one per row. Each is drawn from (seed, index)."""

    def __init__(self, world: World, tokenizer: PreTrainedTokenizerFast, n: int, seed: int) -> None:
        self.world: World = world
        self.n: int = n
        self.seed: int = seed
        self.ids: dict[str, int] = tokenizer.get_vocab()
        self.bos: int = special_id(tokenizer, "bos")[0]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = random.Random(f"{self.seed}-{index}")
        words = self.world.document(rng, SEQUENCE_LENGTH - 1)
        ids = torch.tensor([self.bos, *(self.ids[word] for word in words)])
        return {"input_ids": ids, "labels": ids}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "weights")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world, the initial weights and the documents")
    parser.add_argument("--steps", type=int, default=6000)
    options = parser.parse_args(argv)

    world, tokenizer = World(options.seed), _build_tokenizer()
    model = _build_model(tokenizer, options.seed)
    batch = 48
    arguments = TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=batch,
        learning_rate=2e-3,
        warmup_steps=options.steps // 20,
        lr_scheduler_type="cosine",
        weight_decay=0.05,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        logging_steps=max(1, options.steps // 45),
        save_strategy="no",
        report_to=[],
        seed=options.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    dataset = Documents(world, tokenizer, options.steps * batch, options.seed)
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()

    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    _write_manifest(options.output, options.seed, options.steps, trainer.state.log_history)


def _write_manifest(folder: Path, seed: int, steps: int, log: list[dict]) -> None:
    """Record the origin of the weights: command, seed, loss curve, versions, SHA-256 of every file."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors") and path.is_file())
    manifest = {
        "command": f"python -m repeng.tiny.pretrain --seed {seed} --steps {steps}",
        "seed": seed,
        "curve": [[row["step"], round(row["loss"], 4)] for row in log if "loss" in row],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "sha256": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.name != "manifest.json"
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
