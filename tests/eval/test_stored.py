"""Reports come back from files as they were."""

from dataclasses import fields

import pytest
import torch
from test_eval_report import report

from repeng.eval.eval_report import Budget, Sample
from repeng.eval.stored import load_reports, save_reports


def test_reports_come_back_whole(tmp_path):
    first = report(groups=["a", "b"], units=["u", ""], dropped=["question 3"], operating=(-1.0, 2.0))
    first.samples = [Sample(1.0, "p", "t", True, 0.5, (1, 2), 0.25), Sample(0.0, "p", "é", False, 0.0)]
    first.budget, first.thought = Budget(neutral_nll=0.5), torch.tensor([[True, False]] * 5)
    save_reports(
        tmp_path / "r", {"one / of": [first, report(kl=[0.1] * 5)], "prompts": [report(discrete=True)]}, x=[1]
    )
    found, more = load_reports(tmp_path / "r")
    assert more == {"x": [1]} and list(found) == ["one / of", "prompts"] and found["prompts"][0].discrete
    for field in fields(first):
        before, after = getattr(first, field.name), getattr(found["one / of"][0], field.name)
        if isinstance(before, torch.Tensor):
            assert torch.equal(before, after) and before.dtype == after.dtype, field.name
        elif field.name != "samples":
            assert before == after, field.name
    assert found["one / of"][0].samples[0] == first.samples[0] and found["one / of"][0].samples[1].text == "é"
    assert found["one / of"][1].thought is None and found["one / of"][1].kl[0].item() == pytest.approx(0.1)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_reports(tmp_path / "none")
    (tmp_path / "text").write_text("no")
    with pytest.raises(ValueError, match="holds no reports"):
        load_reports(tmp_path / "text")
