"""Values of files and command lines against declared types."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from repeng.data.schema import checked, checked_keys, checked_text


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, True),
        (int, "5"),
        (int, 2.5),
        (int, None),
        (float, True),
        (float, float("nan")),
        (float, float("inf")),
        (bool, 1),
        (str, 5),
        (list[str], "abc"),
        (list[str], ["a", None]),
        (int | None, "5"),
        (Literal["pairs", "top"], "Pairs"),
        (Annotated[int, Field(ge=1)], 0),
    ],
)
def test_a_value_of_another_type_is_refused_in_one_line_with_its_name_and_itself(hint, value):
    with pytest.raises(ValueError, match=r"^own\.yaml, line 3: r .*got ") as refused:
        checked(hint, value, "own.yaml, line 3: r")
    assert repr(value) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [(float, 3, 3.0), (int | None, None, None), (list[str] | None, ["a"], ["a"]), (Annotated[int, Field(ge=1)], 1, 1)],
)
def test_a_value_of_the_type_is_taken(hint, value, expected):
    taken = checked(hint, value, "key")
    assert taken == expected and type(taken) is type(expected)


@pytest.mark.parametrize(
    ("hint", "text", "expected"),
    [(int, "5", 5), (float, "1e-3", 1e-3), (bool, "yes", True), (int | None, "7", 7), (str, "5", "5")],
)
def test_a_word_of_a_command_line_stands_for_a_value(hint, text, expected):
    assert checked_text(hint, text, "--key") == expected


@pytest.mark.parametrize(
    ("hint", "text"), [(int, "2.5"), (int, ""), (float, "nan"), (float, "1e400"), (float, "0,5"), (bool, "maybe")]
)
def test_a_word_that_is_no_value_of_the_type_is_refused(hint, text):
    with pytest.raises(ValueError, match=f"^--key .*got {text!r}$"):
        checked_text(hint, text, "--key")


def test_an_object_has_the_known_keys_and_the_needed_ones():
    hints = {"chosen": str, "rejected": str, "suffix": str}
    assert checked_keys(hints, {"chosen": "a"}, "f") == {"chosen": "a"}
    with pytest.raises(ValueError, match=r"f, line 2: unknown key 'chosne'.*'chosen'"):
        checked_keys(hints, {"chosne": "a"}, "f, line 2")
    with pytest.raises(ValueError, match=r"f: .*'rejected' is missing"):
        checked_keys(hints, {"chosen": "a"}, "f", needed=("chosen", "rejected"))
    with pytest.raises(ValueError, match=r"f: .*object"):
        checked_keys(hints, ["a"], "f")


def test_a_message_shows_the_beginning_of_a_long_value():
    with pytest.raises(ValueError, match="…") as refused:
        checked(int, "x" * 10_000, "key")
    assert len(str(refused.value)) < 200
