"""Check of a chat template: it is a program that comes with a tokenizer and may be faulty or malicious."""

import sys
import time
from types import FrameType
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

SECONDS = 5.0  # time limit of the template for two words
PROBE = "one two"


class _TooLongError(Exception):
    """The template exceeded the time limit."""


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the tokenizer's chat template, if it has one, renders a short turn of the user.

    Raises:
        ValueError: the template fails, does not end, or leaves out the text. The message names the tokenizer.
    """
    if not tokenizer.chat_template:
        return
    name = tokenizer.name_or_path or "the tokenizer"
    try:
        written = _rendered(tokenizer)
    except _TooLongError:
        raise ValueError(
            f"the chat template of {name} did not end within {SECONDS:g} s; correct it, or remove it"
        ) from None
    except RecursionError:
        raise ValueError(f"the chat template of {name} calls itself endlessly; correct it, or remove it") from None
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError, MemoryError) as error:
        told = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the chat template of {name} fails on a turn of the user ({type(error).__name__}: {told}); correct it, "
            "or remove it"
        ) from None
    if PROBE not in written:
        raise ValueError(
            f"the chat template of {name} leaves out the user's text: it renders {PROBE!r} as {written[:60]!r}; "
            "correct it, or remove it"
        )


def _rendered(tokenizer: PreTrainedTokenizerBase) -> str:
    """The rendered text of a user turn. Computing time is limited to `SECONDS`, unless a trace function is set."""
    end = time.thread_time() + SECONDS

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        if time.thread_time() > end:
            raise _TooLongError
        return watch

    before = sys.gettrace()
    sys.settrace(before or watch)
    try:
        turn = [{"role": "user", "content": PROBE}]
        return str(
            tokenizer.apply_chat_template(turn, add_generation_prompt=True, enable_thinking=False, tokenize=False)
        )
    finally:
        sys.settrace(before)
