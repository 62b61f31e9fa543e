"""Decode a stream of tokens into text, up to a stop text."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

CONTEXT = 8  # preceding tokens on which the text of a token may depend
WINDOW = 64  # tokens that are decoded together; the text of earlier tokens has been returned already
UNFINISHED = "\ufffd"  # a tokenizer decodes a character with missing bytes to this


class TextStream:
    """The text of one answer, in pieces that do not change once they are returned.

    Args:
        tokenizer: the tokenizer that decodes the tokens.
        stop: stop texts. The answer ends before the first of them.
        context: the last tokens before the answer. They are needed because some tokenizers drop a space at the start
            of a text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), context: Sequence[int] = ()
    ) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = list(context)
        self._start = len(self._decoded().rstrip(UNFINISHED))
        self._sent = 0
        self.stopped: bool = False  # whether a stop text was found

    def push(self, ids: Sequence[int], last: bool) -> str:
        """Add tokens and return the new text that is final. `last`: no more tokens follow, so return all of it."""
        self._ids += ids
        whole = self._decoded()[self._start :]
        found = [at for at in (whole.find(stop) for stop in self._stop) if at >= 0]
        text = whole
        if found:
            text, self.stopped = whole[: min(found)], True
        elif not last:
            text = whole.rstrip(UNFINISHED)
            text = text[: len(text) - self._begun(text)]
        piece = text[self._sent :]
        self._sent = max(self._sent, len(text))
        if len(self._ids) > WINDOW and self._sent == len(whole):
            self._ids = self._ids[-CONTEXT:]
            self._start, self._sent = len(self._decoded()), 0
        return piece

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _begun(self, text: str) -> int:
        """Number of characters at the end of `text` that may be the beginning of a stop text."""
        longest = max(map(len, self._stop), default=0)
        ends = range(min(longest - 1, len(text)), 0, -1)
        return next((n for n in ends if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
