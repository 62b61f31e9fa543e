"""Regular expressions of files: those that may take hours are told from those that people use."""

import pytest

from repeng.tuner.fields import check_expression


@pytest.mark.parametrize(
    "expression",
    [
        r".*\.(q|v)_proj",
        r"model\.layers\.(0|[2-9]|1\d)\.mlp\.up_proj",
        r"^((?!(vision_tower|lm_head)).)*\.(q_proj|v_proj)$",
        r"(abc|d){1}\.x{2}",
        r"(?P<layer>\d+)\.q_proj",
    ],
)
def test_a_usual_expression_is_taken(expression):
    check_expression("target_modules", expression, from_file=True)


@pytest.mark.parametrize(
    "expression", [r"(a+)+$", r"(a|a)*$", r"((a|b)c)+", r"a*a*a*a*a*a*a*b", r"(", r"(a{1,9}){1,9}$"]
)
def test_one_that_may_take_hours_or_is_none_is_refused(expression):
    with pytest.raises(ValueError, match=r"^target_modules "):
        check_expression("target_modules", expression, from_file=True)
