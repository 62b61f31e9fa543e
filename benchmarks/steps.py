"""Time of a training step, compared with LoRA with the same rows, loss and sites: `python -m benchmarks.steps`

The model has the shape of a real model and random weights, and the tokens are random: the time is realistic, the loss
is not. The larger shapes need a GPU, for example `--shape qwen3-0.6b`. Prints a table of seconds per step, tokens per
second and, with CUDA, the peak memory of the allocator.
"""

import argparse
import random
import tempfile

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from benchmarks.timing import seconds
from benchmarks.training import CONFIG
from repeng import tiny
from repeng._command import command
from repeng.eval.report.tables import markdown
from repeng.train.arguments import parse_arguments
from repeng.train.build import build
from repeng.train.collator import SIDES
from repeng.train.trainer import SteeringTrainer

# Sizes from the published configurations of Qwen3; "small" is for a CPU.
SHAPES = {
    "small": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 32_000,
    },
    "qwen3-0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
    },
}
METHODS = ("lora", "svd")


def random_model(shape: str, device: torch.device) -> PreTrainedModel:
    """A random model of this shape, in bf16 on a GPU and in float32 on a CPU."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        return Qwen3ForCausalLM._from_config(Qwen3Config(**SHAPES[shape]), dtype=dtype)


def step(method: str, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds per step, and the peak memory in GiB (0 without CUDA)."""
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--output_dir", folder, "--per_device_train_batch_size", str(options.pairs), "--disable_tqdm", "true"]
        argv += ["--bf16", str(torch.cuda.is_available()), "--gradient_checkpointing", str(options.checkpointing)]
        top = ["--directions", "top"] if method == "svd" else []
        task_args, args = parse_arguments([*argv, "--layers", "0.3-0.7", "--adapter", method, *top], CONFIG)
        model = random_model(options.shape, args.device)
        run = build(task_args, args, tiny.task(task_args, args.seed), model=model, tokenizer=tiny.load()[1])
        rng, vocabulary = random.Random(0), run.model.config.vocab_size
        for example in run.examples:
            for side in SIDES:
                example[side] = [rng.randrange(3, vocabulary) for _ in range(options.tokens)]
        examples = run.examples[: options.pairs]
        trainer = SteeringTrainer(run.model, args, examples, run.tokenizer)
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(options.pairs)])

        def one() -> None:
            trainer.training_step(trainer.model, batch)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        one()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        took = seconds(one, options.repeats)
        return took, torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--pairs", type=int, default=8, help="pairs per batch; a step reads eight rows per pair")
    parser.add_argument("--tokens", type=int, default=48, help="tokens per row")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in backward")
    options = parser.parse_args()
    found = {method: step(method, options) for method in METHODS}
    slowest, peak = found[METHODS[0]]
    tokens = 2 * len(SIDES) * options.pairs * options.tokens
    rows = {}
    for method, (took, memory) in found.items():
        rows[method] = {"s per step": f"{took:.3f}", "tokens/s": f"{tokens / took:.0f}", "×": f"{took / slowest:.2f}"}
        if peak:
            rows[method] |= {"peak GiB": f"{memory:.2f}", "× peak": f"{memory / peak:.2f}"}
    print(markdown(rows, first=options.shape))


if __name__ == "__main__":
    with command():
        main()
