"""Log-probabilities in OpenAI's format."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from repeng.serve.decoding import UNFINISHED
from repeng.serve.sampling import Drawn


def of_completion(tokenizer: PreTrainedTokenizerBase, drawn: Sequence[Drawn]) -> dict[str, Any]:
    """`logprobs` of a completion. At one position, tokens with the same text (parts of characters) share an entry."""
    return {
        "tokens": [_text(tokenizer, one.token) for one in drawn],
        "token_logprobs": [one.logprob for one in drawn],
        "top_logprobs": [{_text(tokenizer, token): logp for token, logp in reversed(one.top)} for one in drawn],
    }


def of_chat(tokenizer: PreTrainedTokenizerBase, drawn: Sequence[Drawn]) -> dict[str, Any]:
    """`logprobs` of a chat completion."""
    return {
        "content": [
            {
                **_entry(tokenizer, one.token, one.logprob),
                "top_logprobs": [_entry(tokenizer, token, logp) for token, logp in one.top],
            }
            for one in drawn
        ],
        "refusal": None,
    }


def _entry(tokenizer: PreTrainedTokenizerBase, token: int, logprob: float) -> dict[str, Any]:
    text = _text(tokenizer, token)
    return {"token": text, "logprob": logprob, "bytes": None if UNFINISHED in text else list(text.encode())}


def _text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token]))
