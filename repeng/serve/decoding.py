"""Text from tokens as they come, up to a stop text."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

CONTEXT = 8  # tokens that decide how the next one is written
WINDOW = 64  # tokens that are decoded together; all that came before them has been handed out
UNFINISHED = "\ufffd"  # what a tokenizer shows of a character whose last bytes have not come yet


class TextStream:
    """The text of one answer, handed out in pieces that never change afterwards.

    Args:
        tokenizer: decodes.
        stop: texts before which the answer ends.
        context: tokens before the answer that it goes on from: some tokenizers drop a space at the start of a text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), context: Sequence[int] = ()
    ) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = list(context)
        self._start = len(self._decoded().rstrip(UNFINISHED))
        self._sent = 0
        self.stopped: bool = False  # whether a stop text was met

    def push(self, ids: Sequence[int], last: bool) -> str:
        """What can be handed out after these tokens; with `last`, all that is left."""
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
        """How many characters at the end may be the beginning of a stop text."""
        longest = max(map(len, self._stop), default=0)
        ends = range(min(longest - 1, len(text)), 0, -1)
        return next((n for n in ends if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
