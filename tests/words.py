"""A tiny real tokenizer: byte-level BPE trained on a few sentences, with padding, special tokens and a chat template."""

from __future__ import annotations

from collections.abc import Iterable

from tiny import BOS, EOS, PAD, VOCABULARY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "the cache keeps what the model said",
    "the model is asked what it said before",
    "a question has one answer and an answer has one key",
    "when the weights have changed the key has changed",
    "what is the answer to the first question",
    "nothing is kept that was not checked twice",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def train_tokenizer(sentences: Iterable[str] = SENTENCES, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Trains a tokenizer whose special ids are those of the tiny models; the same sentences give the same ids.

    Args:
        sentences: the text to learn merges from; characters that do not occur in it are dropped when encoding.
        vocabulary: the number of ids, at most; the tiny models know `VOCABULARY`.

    Returns:
        A left-padding tokenizer with a chat template; `save_pretrained` and `from_pretrained` carry all of it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    assert [special.index(token) for token in ("<pad>", "<s>", "</s>")] == [PAD, BOS, EOS]
    # The full byte alphabet has 256 signs, twice the tiny vocabulary: only the bytes of this text are taken.
    text = [*sentences, "user: assistant: system: ?!.,0123456789"]
    tokenizer.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=[], show_progress=False)
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
