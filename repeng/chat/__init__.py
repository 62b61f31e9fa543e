"""Conversations with a model at several coefficients, in the terminal and on a local page (extra `web`)."""

from typing import TYPE_CHECKING

from repeng._imports import lazily

if TYPE_CHECKING:
    from repeng.chat.conversation import Answer, Chat, Column, Cost
else:
    __getattr__, __dir__ = lazily(
        __name__, dict.fromkeys(("Answer", "Chat", "Column", "Cost"), "repeng.chat.conversation")
    )

__all__ = ["Answer", "Chat", "Column", "Cost"]
