"""Peak memory of a training step, for log-probabilities in chunks and for whole logits: `python -m benchmarks.memory`

The model is a random Llama with a large vocabulary. Each variant runs in a separate process, which reports the rise of
its peak resident memory during three steps. With CUDA it reports the peak of the allocator instead. Prints a table.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.training import CONFIG
from repeng import tiny
from repeng._command import command
from repeng.eval.report.tables import markdown
from repeng.train.arguments import parse_arguments
from repeng.train.build import build
from repeng.train.collator import SIDES
from repeng.train.trainer import SteeringTrainer

VARIANTS = ("whole logits", "chunks")


def step(variant: str, vocabulary: int, pairs: int) -> float:
    """Rise of the peak memory in MB (2²⁰ bytes) during three training steps."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        argv = [
            "--output_dir",
            folder,
            "--save_strategy",
            "no",
            "--disable_tqdm",
            "true",
            "--max_steps",
            "3",
            "--r",
            "8",
        ]
        task_args, args = parse_arguments([*argv, "--per_device_train_batch_size", str(pairs)], CONFIG)
        run = build(task_args, args, tiny.task(task_args, args.seed), model=model, tokenizer=tiny.load()[1])
        for example in run.examples:  # equal lengths, as long as an answer
            for name in SIDES:
                example[name] = (example[name] * 64)[:128]
        # The reference is computed for one pair at a time, so that it does not determine the peak.
        single = replace(args, per_device_train_batch_size=1)
        SteeringTrainer(run.model, single, run.examples[: 4 * pairs], run.tokenizer)
        trainer = SteeringTrainer(run.model, args, run.examples[: 4 * pairs], run.tokenizer)
        trainer.plain_head = variant == "chunks"
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        trainer.train()
        if torch.cuda.is_available():
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--variant", choices=VARIANTS, help="run this variant only, in a child process")
    options = parser.parse_args()
    if options.variant:
        print(f"peak {step(options.variant, options.vocabulary, options.pairs):.0f}")
        return
    peaks = {}
    for variant in VARIANTS:
        command = [sys.executable, "-m", "benchmarks.memory", "--variant", variant]
        sizes = ["--vocabulary", str(options.vocabulary), "--pairs", str(options.pairs)]
        done = subprocess.run(
            [*command, *sizes], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
        )
        peaks[variant] = float(done.stdout.rsplit("peak ", 1)[1])
    print(
        markdown(
            {name: {"MB": f"{peak:.0f}", "×": f"{peak / peaks[VARIANTS[0]]:.2f}"} for name, peak in peaks.items()}
        )
    )


if __name__ == "__main__":
    with command():
        main()
