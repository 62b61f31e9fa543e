"""Tokenizers of every kind, trained on a few lines; nothing is downloaded."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "my answer is (A) yes (B) no",
    "the lime looks red or blue",
    "pretend to be honest . pretend to be dishonest . I feel",
    "我的回答：是 我的回答：否 假装你很高兴。假装你很难过。我今天",
    "yes no A B red blue 是 否",
] * 4
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|start|>", "<|end|>"]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def _trained(model, trainer, pre_tokenizer, decoder, **settings):
    inner = Tokenizer(model)
    inner.pre_tokenizer, inner.decoder = pre_tokenizer, decoder
    inner.normalizer = settings.get("normalizer", inner.normalizer)
    inner.train_from_iterator(CORPUS, trainer)
    return inner


def _bytes():
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    return _trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())


def _metaspace(model, trainer):
    kind = {"vocab_size": 160, "special_tokens": SPECIAL, "show_progress": False}
    return _trained(model, trainer(**kind), pre_tokenizers.Metaspace(), decoders.Metaspace())


def _unigram():
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    return _trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(), decoders.Metaspace())


def _wordpiece():
    trainer = trainers.WordPieceTrainer(vocab_size=160, special_tokens=SPECIAL, show_progress=False)
    model = models.WordPiece(unk_token="<unk>")
    return _trained(
        model,
        trainer,
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
        normalizer=normalizers.BertNormalizer(),
    )


def _words():
    trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    splits = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return _trained(models.WordLevel(unk_token="<unk>"), trainer, splits, decoders.WordPiece(prefix="##"))


def _characters():
    letters = [*SPECIAL, *sorted(set("".join(CORPUS)))]
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate([*letters, "\n"])}, unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return inner


KINDS = {
    "bytes": _bytes,
    "metaspace": lambda: _metaspace(models.BPE(unk_token="<unk>"), trainers.BpeTrainer),
    "unigram": _unigram,
    "wordpiece": _wordpiece,
    "words": _words,
    "characters": _characters,
}


def build(kind, *, template=False, marks=True):
    """A tokenizer of this kind; with `marks`, it has tokens for the beginning, the end and padding."""
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} if marks else {}
    made = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](),
        unk_token=None if kind == "bytes" else "<unk>",
        additional_special_tokens=SPECIAL[-2:],
        **named,
    )
    if template:
        made.chat_template = TEMPLATE
    return made
