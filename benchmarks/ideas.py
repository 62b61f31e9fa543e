"""The four ideas behind the package, each as a measurement: `python -m benchmarks.ideas --config smollm2 mood`.

Adds the figures of one model to docs/results/ideas.json. `python docs/draw_ideas.py` draws the pictures of
docs/ideas.md from that file. Every experiment uses the training pairs and the held-out questions of a configuration.
"""

import argparse
import json
import time
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rivals import Bench
from repeng import SteeringVector, extract, steer
from repeng._command import command
from repeng.data.files import write_json
from repeng.data.pairs import ContrastPair
from repeng.data.questions import Question, choice_ids
from repeng.eval.compare import screened_layers, trace
from repeng.eval.curves import Estimate, methods_of
from repeng.eval.measure import Meter
from repeng.model.generate import continuations
from repeng.model.logprob import kl_divergence
from repeng.model.sites import decoder_layers, edit_outputs, eval_mode
from repeng.model.tokens import encode, pad_rows, shared_suffix_length

FILE = Path(__file__).parent.parent / "docs" / "results" / "ideas.json"
PAIRS, MANY = 16, 120  # pairs that are looked at one by one, and those that a vector is made of
AHEAD, TAIL = 8, 8  # tokens that are predicted behind a prompt; positions counted from its end
CUTS = 5  # ends of a prompt that are looked at: whole, and without its last 1 to 4 tokens
COST = 0.1  # nats of KL per token of neutral text, at which effects are read
TEXTS = 6  # neutral texts
READ = (1, 2, 3, 6, 12, "mean")  # numbers of last tokens that an extraction reads
SMALL, LARGE = 0.1, 1.0  # coefficients of the linear prediction
PARTS = ("layers", "tokens", "trajectory", "gradient")
VECTORS = ("mean_diff", "gradient", "fisher")


class Study:
    """A model, some of its pairs as token ids, and the layers that are looked at."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.model, self.tokenizer = bench, bench.model, bench.tokenizer
        self.depth = len(decoder_layers(self.model))
        self.layers = screened_layers(self.depth)
        every = bench.task.pairs
        self.many: list[ContrastPair] = every[:: max(1, len(every) // MANY)][:MANY]  # for extraction
        self.pairs: list[ContrastPair] = every[:: max(1, len(every) // PAIRS)][:PAIRS]
        # Token ids of both sides of each pair, and the number of tokens of the suffix that they share.
        self.rows: list[tuple[list[int], list[int], int]] = []
        for pair in self.pairs:
            chosen, rejected = (encode(self.tokenizer, side, pair.suffix) for side in (pair.chosen, pair.rejected))
            shared = len(chosen.suffix) or shared_suffix_length(chosen.ids, rejected.ids)
            self.rows.append((chosen.ids, rejected.ids, shared))
        self.meter = Meter(
            self.model,
            self.tokenizer,
            bench.task.questions,
            bench.task.unseen_neutral_texts[:TEXTS],
            base=bench.meter.base_context,
        )

    def read(
        self, ids: Sequence[int], patch: dict[int, tuple[list[int], Tensor]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """States `(layers t d)` behind every decoder layer and next-token log-probabilities `(t v)` of one row.

        `patch` gives for some layers positions and the states `(n d)` that take their place.
        """
        states: list[Tensor] = []

        def edit(layer: int, output: Tensor) -> Tensor:
            if patch and layer in patch:
                where, values = patch[layer]
                output = output.clone()
                output[0, where] = values
            states.append(output[0])
            return output

        modules = decoder_layers(self.model)
        with (
            torch.no_grad(),
            eval_mode(self.model),
            edit_outputs([(module, partial(edit, layer)) for layer, module in enumerate(modules)]),
        ):
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        return torch.stack(states), logits.float().log_softmax(dim=-1)

    @cached_property
    def said(self) -> list[list[int]]:
        """How the model goes on behind the chosen prompts."""
        rows = [chosen for chosen, _, _ in self.rows]
        return [ids for ids, _ in continuations(self.model, self.tokenizer, rows, AHEAD - 1, 32, seed=1)]

    def effect(self, vector: SteeringVector) -> dict[str, float]:
        """Effect of both arms at the cost, in nats, with its 95 % interval over questions and texts."""
        points = trace(self.meter, partial(steer, self.model, vector=vector), {+1: [COST], -1: [COST]}, lambda: None)
        return Estimate.of(methods_of({"": [self.meter.report(points)]})[""].both_at(COST))._asdict()


def _ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation."""
    return torch.corrcoef(torch.stack([_ranks(x), _ranks(y)]))[0, 1].item()


def trajectory(study: Study) -> dict[str, Any]:
    """Whether states differ where the continuations will, and how far ahead the last states decide.

    Prompts that differ in one early word are cut at several ends. `correlation` by layer: between what tells the two
    last states apart and what tells the continuations apart. The first is the distance along the mean difference of
    all pairs, the second the KL divergence between the next-token distributions, summed over the next one token or
    the next `AHEAD` / 2. `carried` by tokens ahead: the KL divergence from the chosen prompt's next-token distribution
    of the rejected prompt, unchanged and with the chosen one's states at its last token or tokens, by layer.
    """
    model, tokenizer, half = study.model, study.tokenizer, AHEAD // 2
    cut = [
        (chosen[: len(chosen) - k], rejected[: len(rejected) - k])
        for chosen, rejected, shared in study.rows
        for k in range(min(CUTS, shared))
    ]
    said = continuations(model, tokenizer, [row for pair in cut for row in pair], half, 32, seed=0)
    differences, ahead = [], []
    for i, (chosen, rejected) in enumerate(cut):
        steps = torch.zeros(half)
        for side in (0, 1):
            more = said[2 * i + side][0][: half - 1]
            (a, logp_a), (b, logp_b) = study.read([*chosen, *more]), study.read([*rejected, *more])
            p, q = logp_a[len(chosen) - 1 :], logp_b[len(rejected) - 1 :]
            steps[: len(p)] += (kl_divergence(p, q) if side == 0 else kl_divergence(q, p)) / 2
        ahead.append(steps)
        differences.append(a[:, len(chosen) - 1] - b[:, len(rejected) - 1])
    apart, ahead = torch.stack(differences), torch.stack(ahead)  # (n layers d), (n half)
    mean = apart.mean(dim=0)
    along = (apart * mean).sum(dim=-1) / mean.norm(dim=-1)  # (n layers)
    spans = {"next token": ahead[:, 0], f"next {half} tokens": ahead.sum(dim=1)}
    places = {"last token": [1], "last six tokens": [*range(1, 7)]}
    return {
        "prompts": len(cut),
        "correlation": {
            name: [correlation(along[:, layer], total) for layer in range(study.depth)]
            for name, total in spans.items()
        },
        "carried": {
            "unchanged": left_over(study, 0, []),
            **{
                name: {str(layer): left_over(study, layer, at) for layer in study.layers}
                for name, at in places.items()
            },
        },
    }


def left_over(study: Study, layer: int, positions: Sequence[int]) -> list[float]:
    """Mean KL divergence, at each of `AHEAD` tokens, between the chosen prompt and the rejected one as it is patched.

    Behind one layer, the states of the rejected prompt at positions (from the end, 1 = last) become those of the
    chosen one. Both are followed by what the model says behind the chosen one.
    """
    total = torch.zeros(AHEAD)
    for (chosen, rejected, shared), more in zip(study.rows, study.said, strict=True):
        at = [p for p in positions if p <= shared]
        states, wanted = study.read([*chosen, *more])
        source, where = [len(chosen) - p for p in at], [len(rejected) - p for p in at]
        _, found = study.read([*rejected, *more], {layer: (where, states[layer, source])} if at else None)
        steps = kl_divergence(wanted[len(chosen) - 1 :], found[len(rejected) - 1 :])
        total[: len(steps)] += steps / len(study.rows)
    return total.tolist()


def tokens(study: Study, layer: int) -> dict[str, Any]:
    """Which token holds the plan, and what a vector that was read there does.

    `carried`: as in `trajectory`, for one position at a time (0: for none), at the next token. `effect`: of a mean
    difference that was read as the mean of the last n tokens.
    """
    positions = range(1, TAIL + 1)
    places = [p for p in positions if any(p <= shared for _, _, shared in study.rows)]
    effects = {}
    for n in READ:
        vector = extract(study.model, study.tokenizer, study.many, layers=[layer], tokens=n, held_out=0)
        effects[str(n)] = study.effect(vector)
    effects["padding"] = study.effect(_read_at_padding(study, layer))
    return {
        "layer": layer,
        "carried": {str(p): left_over(study, layer, [p])[0] for p in [0, *places]},
        "effect": effects,
    }


def _read_at_padding(study: Study, layer: int) -> SteeringVector:
    """The mistake: rows padded on the right, and the state at index −1."""
    vector = extract(study.model, study.tokenizer, study.many, layers=[layer], held_out=0)
    rows = [
        encode(study.tokenizer, side, pair.suffix).ids for pair in study.many for side in (pair.chosen, pair.rejected)
    ]
    batch, kept = pad_rows(rows, study.tokenizer, side="right"), []

    def keep(output: Tensor) -> Tensor:
        kept.append(output[:, -1])
        return output

    inputs = [batch[name].split(32) for name in ("input_ids", "attention_mask")]  # positions count the padding
    with torch.no_grad(), eval_mode(study.model), edit_outputs([(decoder_layers(study.model)[layer], keep)]):
        for ids, mask in zip(*inputs, strict=True):
            study.model(input_ids=ids, attention_mask=mask, use_cache=False)
    states = torch.cat(kept).float()
    return SteeringVector({("residual", layer): (states[::2] - states[1::2]).mean(dim=0)}, vector.metadata)


def gradient(study: Study) -> dict[str, Any]:
    """How well a gradient foretells what a direction does, and what steering along the gradient itself does.

    `predicted` and `measured`: the change of the mean log-odds, in nats, for a shift by each of several vectors at
    each layer. The first comes from one backward pass of the unsteered model, the second from steering at ±`SMALL`
    and ±`LARGE`.
    """
    questions, some = study.meter.targets, study.layers[:: 1 if study.depth <= 12 else 2]
    slopes = odds_gradients(study, questions)
    directions: dict[str, SteeringVector] = {}
    effects: dict[str, dict[str, dict[str, float]]] = {}
    cosines: dict[str, list[float]] = {}
    for method in VECTORS:
        directions[method] = extract(study.model, study.tokenizer, study.many, layers=some, method=method, held_out=0)
        single = {layer: directions[method].select(layers=[layer]) for layer in some}
        effects[method] = {str(layer): study.effect(vector) for layer, vector in single.items()}
        base = directions["mean_diff"]
        cosines[method] = [
            torch.cosine_similarity(directions[method][key], base[key], dim=0).item()
            for key in (("residual", layer) for layer in some)
        ]
    directions["random"] = directions["mean_diff"].random_like(seed=0)
    points = []
    for name, vectors in directions.items():
        for layer in some:
            vector = vectors.select(layers=[layer])
            foretold = (slopes[layer] @ vector[layer].to(slopes[layer])).item()
            for c in (SMALL, LARGE):
                plus, minus = (odds(study, questions, vector, s * c) for s in (1, -1))
                measured = (plus - minus) / 2
                points.append(
                    {"vector": name, "layer": layer, "c": c, "predicted": c * foretold, "measured": measured}
                )
    return {"points": points, "effect": effects, "cosine": cosines}


def odds(study: Study, questions: Sequence[Question], vector: SteeringVector, c: float) -> float:
    """Mean log-odds of the first tokens of the choices, steered."""
    with torch.no_grad(), eval_mode(study.model), steer(study.model, c, vector=vector):
        return torch.stack([_odds(study, question) for question in questions]).mean().item()


def _odds(study: Study, question: Question) -> Tensor:
    row = encode(study.tokenizer, question.prompt, question.suffix, history=question.history).ids
    logits = study.model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].float()
    ids = choice_ids(study.tokenizer, question)
    sides = [torch.tensor([i for choice, i in ids.items() if (choice in question.target) == side]) for side in (1, 0)]
    return logits[sides[0]].logsumexp(0) - logits[sides[1]].logsumexp(0)


def odds_gradients(study: Study, questions: Sequence[Question]) -> dict[int, Tensor]:
    """By layer: the gradient `(d)` of the mean log-odds with respect to one shift of all token positions."""
    shifts = {layer: torch.zeros(study.model.config.hidden_size, requires_grad=True) for layer in study.layers}
    modules: nn.ModuleList = decoder_layers(study.model)
    edits = [(modules[layer], lambda output, shift=shift: output + shift) for layer, shift in shifts.items()]
    sums = {layer: torch.zeros(study.model.config.hidden_size) for layer in study.layers}
    with eval_mode(study.model), edit_outputs(edits), torch.enable_grad():
        for question in questions:
            found = torch.autograd.grad(_odds(study, question), list(shifts.values()))
            for layer, value in zip(shifts, found, strict=True):
                sums[layer] += value / len(questions)
    return sums


def layers(study: Study) -> dict[str, Any]:
    """By layer: what a vector does there at equal cost, how well its sides are told apart, and how long it is."""
    every = extract(study.model, study.tokenizer, study.many, layers=study.layers, held_out=0.2)
    return {
        "layers": study.layers,
        "effect": {str(layer): study.effect(every.select(layers=[layer])) for layer in study.layers},
        "accuracy": [every.metadata["accuracy"][f"{layer}.residual"] for layer in study.layers],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", required=True, help="as in train.py")
    parser.add_argument("--out", type=Path, default=FILE, help="file of figures; those of other models are kept")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="experiments to run; others are kept")
    options = parser.parse_args()
    known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    study = Study(Bench(options.config, Path("outputs") / "ideas"))
    found = known.setdefault(options.config[0], {})
    found |= {"config": options.config, "behaviour": study.bench.task.behaviour, "depth": study.depth}

    def best() -> int:
        effects = found["layers"]["effect"]
        return max(study.layers, key=lambda layer: effects[str(layer)]["value"])

    parts = {
        "layers": layers,
        "tokens": lambda study: tokens(study, best()),
        "trajectory": trajectory,
        "gradient": gradient,
    }
    for name in options.parts:
        start = time.process_time()
        found[name] = parts[name](study)
        write_json(options.out, known)
        print(f"{name}: {time.process_time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    with command():
        main()
