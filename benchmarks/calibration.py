"""Does c = ±1 spend the budget on prompts that the calibration did not use? `python -m benchmarks.calibration`

Calibrates the default adapter and the mean difference, for both traits, on training clozes and training neutral texts,
and checks the units on held-out ones. Prints a Markdown table with the unit of each arm and the share of the budget
that it spends on the calibration prompts and on held-out prompts.
"""

import argparse
from functools import partial

from benchmarks.training import train
from repeng import Budget, KLBudget, calibrate, evaluate, extract, steer, tiny
from repeng._command import command
from repeng.eval.calibrate import kl_spender
from repeng.eval.report.tables import markdown
from repeng.tiny import lexicon

LAYER = 2  # layer of the mean difference, the best one for both traits
TEXTS = 128
UNSEEN_SEED = 7


def rows(trait: str, name: str, model, tokenizer, dial, largest: float) -> dict[str, dict[str, str]]:
    """One table row per budget."""
    seen, other = (tiny.questions(trait, split) for split in ("train", "held_out"))
    texts = [tiny.neutral_texts(TEXTS, seed) for seed in (0, UNSEEN_SEED)]
    found = {}
    for budget in (KLBudget(tokens=8), Budget()):
        if isinstance(budget, KLBudget):
            prompts = [[q.suffix for q in asked if q.kind == "target"] for asked in (seen, other)]
            calibration = calibrate(model, tokenizer, dial, prompts[0], budget, largest=largest)
            spend = kl_spender(model, tokenizer, dial, prompts[1], budget, 256)
        else:
            calibration = calibrate(
                model, tokenizer, dial, budget=budget, questions=seen, neutral_texts=texts[0], largest=largest
            )

            def spend(c: float) -> float:
                report = evaluate(model, tokenizer, other, dial, [c], neutral_texts=texts[1])
                return report.spent()[report.at(c)].item()

        found[f"{trait}, {name}, {type(budget).__name__}"] = {
            "c = +1": f"{calibration.plus:.2f}",
            "c = −1": f"{calibration.minus:.2f}",
            "spent there": f"{calibration.spent['plus']:.2f} / {calibration.spent['minus']:.2f}",
            "on held-out prompts": f"{spend(calibration.plus):.2f} / {spend(-calibration.minus):.2f}",
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    table = {}
    for trait, (plus, minus) in lexicon.PERSONAS.items():
        model, tokenizer = tiny.load()
        vector = extract(model, tokenizer, tiny.pairs(trait, 72, options.seed), layers=[LAYER], held_out=0)
        table |= rows(trait, "mean difference", model, tokenizer, partial(steer, model, vector=vector), 8.0)
        run = train(options.seed, ["--positive", plus[0], "--negative", minus[0]])
        table |= rows(trait, "adapter", run.model, tokenizer, partial(steer, run.model), 4.0)
    print(markdown(table, "dial and budget"))


if __name__ == "__main__":
    with command():
        main()
