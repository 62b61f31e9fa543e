"""Measure an adapter or a vector: `evaluate` and `calibrate`."""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import nn

from repeng._file_names import CALIBRATION, EVALUATION, PAGE, REPORT
from repeng.commands.base import Loaded, load_task_model, put_on, read_steering
from repeng.control.lora import lora_names, scale_weights
from repeng.control.steer import steer
from repeng.data.arguments import TaskArguments
from repeng.data.folders import claimed
from repeng.data.pairs import ContrastPair
from repeng.data.task import make_task, split_pairs
from repeng.eval.calibrate import Calibration, KLBudget, kl_spender, set_units
from repeng.eval.calibrate import calibrate as find_calibration
from repeng.eval.compare import compare
from repeng.eval.eval_report import ARMS
from repeng.eval.measure import Dial
from repeng.eval.report.folder import write_report
from repeng.eval.report.tables import print_doses, print_table
from repeng.model.cache import cache_folder
from repeng.train.adapter_files import save_adapter

OWN = "this dial"
LARGEST = 4.0  # largest coefficient of an adapter, trained at 1; far beyond, effects shrink but costs may not
TOLERANCE = 0.1


def evaluate(
    path: Path,
    task_args: TaskArguments,
    *,
    output: str | None,
    seed: int,
    use_cpu: bool,
    bf16: bool,
) -> dict[str, Any]:
    """Evaluate an adapter or a vector: print the table and the verdict, and write the report.

    Returns:
        The path of the report, and what `report.json` holds.
    """
    steering = read_steering(path)
    beside = path / EVALUATION if path.is_dir() else path.with_name(f"{path.stem}-report")
    with claimed(output or beside, "--output") as folder:
        base = load_task_model(task_args, seed, use_cpu, bf16)
        steering.check(base.model)
        task = make_task(task_args, base.model, base.tokenizer, base.pairs, seed=seed, own=base.own)
        loaded = put_on(steering, base.model)
        comparison = compare(loaded.model, base.tokenizer, task, loaded.dial, OWN, cache=cache_folder())
        write_report(comparison, folder, title=f"{path.name}: {task.behaviour}")
    print_doses(comparison.reports[OWN][0], f"{path}: {task.behaviour}")
    print_table(comparison)
    print(comparison.verdict)
    page = folder / PAGE
    print(f"report: {page}")
    return {"report": str(page), **json.loads((folder / REPORT).read_text(encoding="utf-8"))}


def calibrate(
    path: Path,
    task_args: TaskArguments,
    *,
    nats: float,
    sequences: int,
    percentile: float,
    seed: int,
    use_cpu: bool,
    bf16: bool,
) -> dict[str, Any]:
    """Find and store the calibration, and check it on other prompts of the training set.

    Raises:
        ValueError: there are too few prompts, or the file for the result exists already.
    """
    target = path if path.suffix != ".gguf" else path.with_suffix(".safetensors")
    if target != path and target.exists():
        raise ValueError(
            f"the calibrated vector of a GGUF file is stored as {target}, which exists already: move it, or calibrate "
            "that file"
        )
    budget = KLBudget(nats, percentile, sequences=sequences)
    steering = read_steering(path)
    with claimed(path, "PATH") if path.is_dir() else nullcontext():
        base = load_task_model(task_args, seed, use_cpu, bf16)
        steering.check(base.model)
        pairs, _ = split_pairs(task_args, base.pairs, base.own)
        prompts = _training_prompts(pairs, has_template=bool(base.tokenizer.chat_template))
        if len(prompts) < 2:
            raise ValueError(
                f"the pairs have {len(prompts)} prompt to continue; the calibration and its check need two or more"
            )
        loaded = put_on(steering, base.model)
        largest = LARGEST if loaded.vector is None else 8.0
        calibration = find_calibration(
            loaded.model, base.tokenizer, loaded.dial, prompts[::2], budget, largest=largest
        )
        dial, at = _store(loaded, calibration, target, nats)
    checked: dict[str, float] = {}
    spend = kl_spender(loaded.model, base.tokenizer, dial, prompts[1::2], budget)
    for arm, sign in ARMS:
        spent = budget.nats * spend(at[sign])
        checked[arm] = spent
        if abs(at[sign]) == 1:
            before = sign * getattr(calibration, arm)
            print(f"c = {at[sign]:+g} is as strong as c = {before:+.3g} was before the calibration.")
        print(
            f"At c = {at[sign]:+.3g}, percentile {budget.percentile:g} of the KL per token is {spent:.3g} nats on "
            f"{len(prompts[1::2])} other prompts. The budget is {budget.nats:g} nats."
        )
        if calibration.spent[arm] < 1 - TOLERANCE:
            print(
                f"  This arm spends {calibration.spent[arm]:.0%} of the budget: no coefficient that was tried spends "
                "all of it."
            )
    print(f"stored: {target}")
    return {"stored": str(target), **calibration.to_dict(), "checked": checked}


def _store(loaded: Loaded, calibration: Calibration, target: Path, nats: float) -> tuple[Dial, dict[int, float]]:
    """Store the calibrated adapter or vector.

    Returns:
        Its dial, and for each sign the coefficient that spends the budget.

    Raises:
        ValueError: the adapter is a LoRA, and neither arm spends the budget at any coefficient that was tried.
    """
    model, vector, at = loaded.model, loaded.vector, {sign: float(sign) for _, sign in ARMS}
    if vector is not None:
        vector = vector.calibrated(calibration.to_dict())
        vector.save(target)
        return partial(steer, model, vector=vector), at
    if not lora_names(cast(nn.Module, model)):
        set_units(model, calibration)
        save_adapter(cast(PeftModel, model), target)
        return loaded.dial, at
    if max(calibration.spent.values()) < 1 - TOLERANCE:
        raise ValueError(
            f"no coefficient up to {LARGEST:g} spends {nats:g} nats: the adapter is left as it is; give fewer --nats"
        )
    factor = min(calibration.plus, calibration.minus)
    scale_weights(cast(nn.Module, model), factor)
    told = json.dumps({"weights_times": factor, **calibration.to_dict()}, indent=1) + "\n"
    save_adapter(cast(PeftModel, model), target, more={CALIBRATION: told})
    print(f"A LoRA has one scale for both arms. Its weights were multiplied by {factor:.3g}.")
    return loaded.dial, {sign: sign * getattr(calibration, arm) / factor for arm, sign in ARMS}


def _training_prompts(pairs: Sequence[ContrastPair], *, has_template: bool) -> list[str]:
    """The prompts that the calibration continues: the suffixes of the pairs, which hold no persona.

    With a chat template, or if a pair has no suffix, they are both sides of each pair.
    """
    if has_template or not all(pair.suffix for pair in pairs):
        texts = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    else:
        texts = [pair.suffix for pair in pairs]
    return list(dict.fromkeys(texts))


DO: dict[str, Callable[..., dict[str, Any]]] = {"evaluate": evaluate, "calibrate": calibrate}
