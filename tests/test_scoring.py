"""Log-likelihoods equal a plain loop's, and are asked of the model once."""

from __future__ import annotations

import pytest
import tiny
import torch
import words
from transformers import LlamaForCausalLM

from evalcache.cache import Cache
from evalcache.errors import EvalCacheError
from evalcache.integrations.scoring import loglikelihood

PAIRS = [
    ("the model is", " asked"),
    ("the model is", " kept"),
    ("a longer context with more words in it than the other", " and a longer continuation"),
    ("the model is", " asked"),
    ("trailing space ", "here"),
    ("", "no context at all"),
]
QUESTION = [("what is the answer", sign) for sign in "?!.,"]


@pytest.fixture(scope="module")
def tokenizer():
    return words.train_tokenizer()


def plain(model, tokenizer, pairs):
    """What anybody would write: one pair at a time, no padding."""
    scores = []
    for context, continuation in pairs:
        spaces = len(context) - len(context.rstrip())
        head, tail = context.rstrip(), context[len(context) - spaces :] + continuation
        whole = tokenizer.encode(head + tail)
        start = tokenizer.encode(head) if head else []
        tail_ids = whole[len(start) :]
        start = start or [tokenizer.bos_token_id]
        with torch.no_grad():
            # The last token is only predicted, never read.
            logits = model(input_ids=torch.tensor([start + tail_ids[:-1]])).logits[0, len(start) - 1 :].float()
        logprobs = torch.log_softmax(logits, -1)[torch.arange(len(tail_ids)), torch.tensor(tail_ids)]
        scores.append((logprobs, bool((logits.argmax(-1) == torch.tensor(tail_ids)).all())))
    return scores


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "mixtral", "mamba", "phi3_longrope", "bloom"])
def test_equals_a_plain_loop(name, tokenizer, tmp_path):
    model = tiny.build(name)
    expected = plain(model, tokenizer, PAIRS)
    for hits in (0, 5):
        cache = Cache(tmp_path)
        scores = loglikelihood(model, tokenizer, PAIRS, cache=cache)
        for score, (logprobs, greedy) in zip(scores, expected, strict=True):
            torch.testing.assert_close(torch.tensor(score.token_logprobs), logprobs, atol=2e-5, rtol=1e-5)
            assert score.logprob == pytest.approx(float(logprobs.sum()), abs=1e-4)
            assert score.is_greedy == greedy
        assert (cache.counts.hits, cache.counts.duplicates, sum(cache.counts.uncacheable.values())) == (hits, 1, 0)
        cache.close()


def test_a_dynamic_rope_is_asked_in_order_and_never_stored(tokenizer, tmp_path):
    """Its rotary embedding remembers the rows before: each loop starts from a model that has seen nothing."""
    expected = plain(tiny.build("llama_dynamic"), tokenizer, PAIRS)
    cache = Cache(tmp_path)
    scores = loglikelihood(tiny.build("llama_dynamic"), tokenizer, PAIRS, cache=cache, max_length=256)
    for score, (logprobs, _) in zip(scores, expected, strict=True):
        torch.testing.assert_close(torch.tensor(score.token_logprobs), logprobs, atol=2e-5, rtol=1e-5)
    assert cache.counts.uncacheable == {"unsupported": len(PAIRS)}
    cache.close()


def test_batches_do_not_matter(tokenizer, tmp_path):
    model = tiny.build("llama")
    cache = Cache(tmp_path)
    small = loglikelihood(model, tokenizer, PAIRS, cache=cache, batch_tokens=1)
    cache.flush()
    large = loglikelihood(model, tokenizer, list(reversed(PAIRS)), cache=cache, batch_tokens=10_000)
    assert large == list(reversed(small))
    assert cache.counts.misses == 5
    cache.close()


def test_letters_share_one_row(tokenizer, tmp_path):
    """Four single-token choices of one question are one forward of one row."""
    model = tiny.build("llama")
    shapes = []
    forward = type(model).forward
    cache = Cache(tmp_path)

    class Watching(type(model)):
        def forward(self, input_ids=None, **kwargs):
            shapes.append(tuple(input_ids.shape))
            return forward(self, input_ids=input_ids, **kwargs)

    model.__class__ = Watching
    scores = loglikelihood(model, tokenizer, QUESTION, cache=cache)
    assert len(scores) == 4 and [rows for rows, _ in shapes] == [1, 2, 1]  # two of them ask whether rows may share a batch
    cache.close()


def test_an_edit_is_seen(tokenizer, tmp_path):
    model = tiny.build("llama")
    cache = Cache(tmp_path)
    before = loglikelihood(model, tokenizer, PAIRS, cache=cache)
    model.lm_head.weight.data.mul_(-1)
    after = loglikelihood(model, tokenizer, PAIRS, cache=cache)
    assert before != after
    for score, (logprobs, _) in zip(after, plain(model, tokenizer, PAIRS), strict=True):
        torch.testing.assert_close(torch.tensor(score.token_logprobs), logprobs, atol=2e-5, rtol=1e-5)
    cache.close()


def test_costs_add_up(tokenizer, tmp_path):
    model = tiny.build("llama")
    cache = Cache(tmp_path)
    loglikelihood(model, tokenizer, PAIRS + QUESTION, cache=cache)
    spent = cache.counts.spent_seconds
    cache.close()
    again = Cache(tmp_path)
    loglikelihood(model, tokenizer, PAIRS + QUESTION, cache=again)
    assert spent > 0 and again.counts.credited_seconds == pytest.approx(spent, rel=1e-9)
    again.close()


def test_context_is_cut_at_its_beginning(tokenizer, tmp_path):
    model = tiny.build("llama")
    cache = Cache(tmp_path)
    long, short = ("the model is asked " * 60 + "what is", " the answer"), 16
    cut = loglikelihood(model, tokenizer, [long], cache=cache, max_length=short)[0]
    ids = tokenizer.encode(long[0] + long[1])[-(short + 1) :]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0].float()
    count = len(cut.token_logprobs)
    expected = torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])][-count:]
    torch.testing.assert_close(torch.tensor(cut.token_logprobs), expected, atol=2e-5, rtol=1e-5)
    cache.close()


def test_refusals(tokenizer, tmp_path):
    cache = Cache(tmp_path)
    with pytest.raises(EvalCacheError, match="no tokens"):
        loglikelihood(tiny.build("llama"), tokenizer, [("context", "")], cache=cache)
    with pytest.raises(EvalCacheError, match="causal"):
        loglikelihood(tiny.build("t5"), tokenizer, PAIRS, cache=cache)
    assert loglikelihood(tiny.build("llama"), tokenizer, [], cache=cache) == []
    cache.close()


def test_training_mode_is_computed_and_counted(tokenizer, tmp_path):
    model = tiny.build("llama").train()
    cache = Cache(tmp_path)
    assert len(loglikelihood(model, tokenizer, PAIRS, cache=cache)) == len(PAIRS)
    assert cache.counts.uncacheable == {"training": len(PAIRS)}
    cache.close()


def test_the_dtype_of_the_softmax_is_keyed(tokenizer, tmp_path):
    model = tiny.build("llama").to(torch.bfloat16)
    asked = {
        dtype: loglikelihood(model, tokenizer, PAIRS, cache=None, softmax_dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert asked[torch.float32] != asked[torch.bfloat16]
    for hits in (0, 5):
        for dtype, bare in asked.items():
            cache = Cache(tmp_path)
            assert loglikelihood(model, tokenizer, PAIRS, cache=cache, softmax_dtype=dtype) == bare
            assert cache.counts.hits == hits
            cache.close()


class Neighbourly(LlamaForCausalLM):
    """Every row sees the mean of its batch."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + output.logits.mean(0, keepdim=True)
        return output


def test_rows_that_depend_on_each_other_are_scored_alone(tokenizer, tmp_path):
    model = tiny.build("llama")
    model.__class__ = Neighbourly
    expected = plain(model, tokenizer, PAIRS)
    for hits in (0, 5):
        cache = Cache(tmp_path)
        scores = loglikelihood(model, tokenizer, PAIRS, cache=cache)
        for score, (logprobs, _) in zip(scores, expected, strict=True):
            torch.testing.assert_close(torch.tensor(score.token_logprobs), logprobs, atol=2e-5, rtol=1e-5)
        assert cache.counts.hits == hits
        cache.close()
