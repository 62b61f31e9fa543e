"""Whether a chat template can be used: it is a program that came with a tokenizer, perhaps from somebody else."""

import sys
import time
from types import FrameType
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

SECONDS = 5.0  # that a template may take for two words
PROBE = "one two"


class _TooLongError(Exception):
    """A template did not end."""


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if the tokenizer's chat template fails on a short turn, never ends, or drops the text.

    Raises:
        ValueError: in a sentence that names the tokenizer.
    """
    if not tokenizer.chat_template:
        return
    name = tokenizer.name_or_path or "the tokenizer"
    try:
        written = _rendered(tokenizer)
    except _TooLongError:
        raise ValueError(
            f"the chat template of {name} did not end in {SECONDS:g} s; mend it, or take it out"
        ) from None
    except RecursionError:
        raise ValueError(f"the chat template of {name} calls itself without an end; mend it, or take it out") from None
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError, MemoryError) as error:
        told = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the chat template of {name} fails on a turn of the user ({type(error).__name__}: {told}); mend it, or "
            "take it out"
        ) from None
    if PROBE not in written:
        raise ValueError(
            f"the chat template of {name} leaves out what the user says: of {PROBE!r} it makes {written[:60]!r}; mend "
            "it, or take it out"
        )


def _rendered(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a turn of the user, within `SECONDS` of computing, unless a debugger watches."""
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
