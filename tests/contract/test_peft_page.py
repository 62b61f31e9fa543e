"""docs/peft.md says what PEFT's operations do with an adapter of this method, and they do it."""

import peft_operations
import pytest


@pytest.mark.filterwarnings("ignore")  # PEFT warns of much that these operations mean
@pytest.mark.parametrize("operation", peft_operations.OPERATIONS, ids=lambda operation: operation.text)
def test_an_operation_does_what_the_page_says(operation, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert operation.row(tmp_path) in peft_operations.PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_lists_these_operations_and_no_others():
    lines = peft_operations.PAGE.read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    assert [row for row in rows if row != "operation"] == [o.text for o in peft_operations.OPERATIONS]
