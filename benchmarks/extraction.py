"""Time to extract steering vectors, compared with vgel/repeng 0.4.0 on the same model, and by number of layers.

python -m benchmarks.extraction [--pairs 256] [--width 512] [--depth 12]

vgel/repeng runs in a separate environment that uv creates, with the same versions of torch and transformers.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import seconds
from repeng import ContrastPair, extract, tiny
from repeng._command import command

THEIRS = """
import json, sys, time
from pathlib import Path
import torch
from repeng import ControlVector, DatasetEntry
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(int(sys.argv[3]))
folder, repeats = Path(sys.argv[1]), int(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
pairs = [DatasetEntry(*pair) for pair in json.loads((folder / "texts.json").read_text())]
times = []
for _ in range(repeats):
    start = time.perf_counter()
    ControlVector.train(model, tokenizer, pairs, method="pca_diff", batch_size=32)
    times.append(time.perf_counter() - start)
print(json.dumps(min(times)))
"""


def save_model(folder: Path, width: int, depth: int, pairs: list[ContrastPair]) -> None:
    """Save a random Llama with a vocabulary of 32,000 tokens, the embedded tokenizer, and the pairs as texts."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny.load()[1].save_pretrained(folder)
    texts = [[f"{side} {pair.suffix}" for side in (pair.chosen, pair.rejected)] for pair in pairs]
    (folder / "texts.json").write_text(json.dumps(texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    threads, pairs = torch.get_num_threads(), tiny.pairs("honesty", args.pairs, 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder, args.width, args.depth, pairs)
        model, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), tiny.load()[1]
        (folder / "theirs.py").write_text(THEIRS)
        versions = {"repeng": "0.4.0", **{name: version(name).split("+")[0] for name in ("torch", "transformers")}}
        command = ["uv", "run", "--isolated", "--no-project"]
        for package, number in versions.items():
            command += ["--with", f"{package}=={number}"]
        done = subprocess.run(
            [*command, "python", str(folder / "theirs.py"), name, str(args.repeats), str(threads)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=name,
            check=False,
        )
    if done.returncode:
        sys.exit("vgel/repeng 0.4.0 could not be run")
    theirs = json.loads(done.stdout.splitlines()[-1])
    rows = {"vgel/repeng 0.4.0, layers 1 to last": (theirs, None)}
    for share in (1.0, 0.5, 0.25):
        layers = list(range(max(1, round(share * args.depth))))
        took = seconds(
            lambda layers=layers: extract(model, tokenizer, pairs, layers=layers, method="pca_diff"), args.repeats
        )
        rows[f"this package, first {len(layers)} of {args.depth} layers"] = (took, share)
    whole = rows[f"this package, first {args.depth} of {args.depth} layers"][0]
    table = Table(title=f"{args.pairs} pairs, pca_diff, Llama {args.depth} × {args.width}, {threads} threads")
    for title in ("", "seconds", "times as fast as repeng 0.4.0", "share of the whole depth's time"):
        table.add_column(title, justify="right" if title else "left")
    for label, (took, share) in rows.items():
        depth = "" if share is None else f"{took / whole:.2f}"
        table.add_row(label, f"{took:.2f}", f"{theirs / took:.2f}", depth)
    Console(width=120).print(table)


if __name__ == "__main__":
    with command():
        main()
