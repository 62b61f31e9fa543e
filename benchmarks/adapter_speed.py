"""Speed of generation and training with an adapter, compared with the base model and LoRA of equal rank and sites.

python -m benchmarks.adapter_speed [--width 512] [--depth 12] [--r 64]
"""

import argparse
import copy

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import seconds
from repeng import SvdSteeringConfig, steer
from repeng._command import command

SITES = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
NEW_TOKENS = 40


def generation(model: nn.Module, ids: torch.Tensor) -> float:
    """Seconds per new token, for two prompts of 16 tokens."""
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return seconds(lambda: model.eval().generate(input_ids=ids, **settings)) / NEW_TOKENS


def training(model: nn.Module, rows: torch.Tensor) -> float:
    """Seconds per forward and backward pass of 16 rows of 64 tokens."""
    return seconds(lambda: model.train()(input_ids=rows, labels=rows).loss.backward())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--r", type=int, default=64)
    args = parser.parse_args()
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=args.width,
            intermediate_size=3 * args.width,
            num_hidden_layers=args.depth,
            num_attention_heads=args.width // 64,
            num_key_value_heads=args.width // 128,
        )
    )
    ids, rows = torch.randint(3, 900, (2, 16)), torch.randint(3, 900, (16, 64))
    signs = torch.tensor([1.0, -1.0]).repeat_interleave(8)
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=args.r, target_modules=SITES))
    sites = {"r": args.r, "init_weights": False}
    all_sites = get_peft_model(copy.deepcopy(base), SvdSteeringConfig(target_modules=SITES, **sites))
    residual = get_peft_model(copy.deepcopy(base), SvdSteeringConfig(target_modules=["residual"], **sites))
    generate = {"base": generation(base, ids), "LoRA, all sites": generation(lora, ids)}
    train = {"LoRA, all sites": training(lora, rows)}
    for name, model in (("this adapter, all sites", all_sites), ("this adapter, residual", residual)):
        with steer(model, 1.0):
            generate[f"{name}, c = 1"] = generation(model, ids)
        with steer(model, torch.tensor([1.0, -1.0])):
            generate[f"{name}, c by row"] = generation(model, ids)
        with steer(model, 0.0):
            generate[f"{name}, c = 0"] = generation(model, ids)
        with steer(model, signs):
            train[f"{name}, c by row"] = training(model, rows)
    table = Table(title=f"Llama {args.depth} × {args.width}, r = {args.r}, {torch.get_num_threads()} threads, float32")
    for title in ("", "ms per token", "× base", "× LoRA", "s per training step", "× LoRA"):
        table.add_column(title, justify="right" if title else "left")
    for name in [*generate, *(name for name in train if name not in generate)]:
        cells = ["", "", "", "", ""]
        if name in generate:
            took = generate[name]
            cells[:3] = [
                f"{1e3 * took:.1f}",
                f"{took / generate['base']:.2f}",
                f"{took / generate['LoRA, all sites']:.2f}",
            ]
        if name in train:
            cells[3:] = [f"{train[name]:.2f}", f"{train[name] / train['LoRA, all sites']:.2f}"]
        table.add_row(name, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    with command():
        main()
