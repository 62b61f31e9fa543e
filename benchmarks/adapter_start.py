"""Time to create an adapter, compared with a full SVD of the same weights, and the error of its bases.

python -m benchmarks.adapter_start [--width 1024] [--r 64] [--svd_niter 0 1 2 4]
"""

import argparse
import json

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import seconds
from repeng import SvdSteeringConfig
from repeng._command import command
from repeng.tuner.base import dense_weight
from repeng.tuner.layer import Linear

SITES = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]


def model(width: int) -> nn.Module:
    """One decoder layer with proportions as in Qwen3-0.6B, and singular values that decay as in trained weights."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
    )
    torch.manual_seed(0)
    result = LlamaForCausalLM(config)
    for name, module in result.named_modules():
        if name.endswith(tuple(SITES)):
            n = min(module.weight.shape)
            spectrum = torch.arange(1, n + 1).float() ** -0.4
            left, right = (nn.init.orthogonal_(torch.empty(d, n)) for d in module.weight.shape)
            module.weight.data = (left * spectrum) @ right.T
    return result


def measure(width: int, r: int, niter: int) -> dict[str, float]:
    """Creation time, and the errors of the bases relative to the exact ones.

    `excess_error`: relative excess of the share of W outside the bases over the smallest possible share.
    `subspace_distance`: 1 − mean cos² of the angles between U and the exact U. Both are the largest of all sites.
    """
    base = model(width)
    config = SvdSteeringConfig(r=r, target_modules=SITES, svd_niter=niter)
    made: list[nn.Module] = []

    def create() -> None:
        made.append(get_peft_model(base, config))
        made[-1].unload()

    took = seconds(create)
    adapted = get_peft_model(base, config)
    excess, angle = [], []
    for site in (m for m in adapted.modules() if isinstance(m, Linear)):
        weight = dense_weight(site.base_layer)
        u, s, _ = torch.linalg.svd(weight, full_matrices=False)
        best = (s[r:].square().sum() / s.square().sum()).sqrt().item()
        excess.append(site.svd_error["default"] / best - 1)
        angle.append(1 - (u[:, :r].T @ site.svd_steering_u["default"]).square().sum().item() / r)
    return {"seconds": took, "excess_error": max(excess), "subspace_distance": max(angle)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--svd_niter", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()
    weights = [dense_weight(m) for name, m in model(args.width).named_modules() if name.endswith(tuple(SITES))]
    full = seconds(lambda: [torch.linalg.svd(weight, full_matrices=False) for weight in weights], repeats=1)
    table = Table(title=f"seven sites of one layer of width {args.width}, r = {args.r}; full SVD: {full:.2f} s")
    for title in ("svd_niter", "seconds", "share of full SVD", "error above the best, %", "1 − cos² of subspaces"):
        table.add_column(title, justify="right")
    rows = {}
    for niter in args.svd_niter:
        row = measure(args.width, args.r, niter)
        row["share_of_full_svd"] = row["seconds"] / full
        rows[niter] = row
        table.add_row(
            f"{niter}{' (exact)' if niter == 0 else ''}",
            f"{row['seconds']:.2f}",
            f"1/{full / row['seconds']:.1f}",
            f"{100 * row['excess_error']:.3f}",
            f"{row['subspace_distance']:.4f}",
        )
    Console().print(table)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"full_svd_seconds": full, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    with command():
        main()
