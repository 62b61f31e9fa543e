"""Compare choices of the bases that an adapter rotates, at equal rank: `python -m benchmarks.dimensions`.

Each run is the main job (configs/tiny.yaml) with different bases. "top": the singular triples with the largest
singular values of the weight. "selected": the singular triples along which the pairs differ most, by s‖dX v‖. "pairs":
the weight restricted to the leading right singular vectors of dX, where dX are the chosen minus the rejected inputs of
the site. Prints a Markdown table.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.training import ranges_row, trained_report
from repeng._command import command
from repeng.eval.report.tables import markdown
from repeng.train.arguments import SteeringArguments
from repeng.train.build import Run
from repeng.train.reference import pair_differences
from repeng.tuner.base import dense_weight

Bases = tuple[Tensor, Tensor, Tensor]


def top(weight: Tensor, _dx: Tensor, r: int) -> Bases:
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :r], s[:r], vh[:r].mT


def selected(weight: Tensor, dx: Tensor, r: int) -> Bases:
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    keep = (s * (dx @ vh.mT).norm(dim=0)).topk(r).indices
    return u[:, keep], s[keep], vh[keep].mT


def pairs(weight: Tensor, dx: Tensor, r: int) -> Bases:
    inputs = torch.linalg.svd(dx, full_matrices=False).Vh[:r].mT
    u, s, vh = torch.linalg.svd(weight @ inputs, full_matrices=False)
    return u, s, inputs @ vh.mT


CHOICES: dict[str, Callable[[Tensor, Tensor, int], Bases]] = {"top": top, "selected": selected, "pairs": pairs}


@torch.no_grad()
def put_bases(prepared: Run, args: SteeringArguments, choice: str) -> None:
    """Replace the bases of a fresh adapter."""
    model = prepared.model
    for key, dx in pair_differences(model, prepared.tokenizer, prepared.examples, args.last_n_tokens).items():
        site = model.get_base_model().get_submodule(key)
        bases = CHOICES[choice](dense_weight(site.base_layer), dx, prepared.sites.r)
        for name, tensor in zip("usv", bases, strict=True):
            getattr(site, f"svd_steering_{name}")["default"].copy_(tensor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--r", type=int, nargs="+", default=[4, 8, 32])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--choices", nargs="+", choices=list(CHOICES), default=list(CHOICES))
    options, extra = parser.parse_known_args()
    rows = {}
    for r in options.r:
        for choice in options.choices:
            prepare = partial(put_bases, choice=choice)
            reports = [
                trained_report(seed, ["--adapter", "svd", *extra, "--r", str(r)], prepare=prepare)
                for seed in options.seeds
            ]
            rows[f"r = {r}, {choice}"] = ranges_row(reports)
    print(markdown(rows, "directions"))


if __name__ == "__main__":
    with command():
        main()
