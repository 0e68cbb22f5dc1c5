"""A script that trains and evaluates in turn: weights change in place, and no answer of yesterday's weights is ever served."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from served import Served
from tiny import VOCABULARY, build, prompts
from transformers import Trainer, TrainerCallback, TrainingArguments

import evalcache
from evalcache.code import ORIGINAL

BATCH = prompts(3)


def evaluate(model, **more):
    return model.generate(**BATCH, max_new_tokens=5, do_sample=False, **more)


def bare(model):
    """What the model says now, without evalcache."""
    generate = type(model).generate
    return getattr(generate, ORIGINAL, generate)(model, **BATCH, max_new_tokens=5, do_sample=False)


def train_step(model, optimizer, seed):
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(seed))
    model.train()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    return float(loss.detach())


@pytest.fixture
def session(store_folder):
    with evalcache.enable() as opened:
        yield opened


OPTIMIZERS = {
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, fused=True),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, foreach=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_step_makes_another_model_and_what_has_not_changed_hits(session, name):
    model = build("llama")
    optimizer = OPTIMIZERS[name](model.parameters())
    served = Served(session.cache)
    seen = []
    for step in range(4):
        answer, told = served.ask(evaluate, model)
        assert torch.equal(answer, bare(model)), "a stale answer"
        assert (told.hits, told.misses, told.uncacheable) == (0, 3, {}), step
        again, told = served.ask(evaluate, model)
        assert torch.equal(again, answer) and (told.hits, told.misses) == (3, 0)
        seen.append(answer)
        train_step(model, optimizer, step)
    assert any(not torch.equal(*pair) for pair in itertools.pairwise(seen)), "the steps were too small to tell"


def test_a_step_that_changes_nothing_hits(session):
    model = build("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    served = Served(session.cache)
    served.ask(evaluate, model)
    train_step(model, optimizer, 0)
    _, told = served.ask(evaluate, model)
    assert (told.hits, told.misses) == (3, 0)


def test_going_back_to_a_checkpoint_finds_its_answers(session):
    model = build("llama")
    served = Served(session.cache)
    before, _ = served.ask(evaluate, model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_step(model, OPTIMIZERS["fused"](model.parameters()), 0)
    served.ask(evaluate, model)
    model.load_state_dict(state)
    after, told = served.ask(evaluate, model)
    assert (told.hits, told.misses) == (3, 0) and torch.equal(before, after)


def test_training_goes_on_exactly_as_it_would_have(store_folder):
    def train():
        torch.manual_seed(0)
        model = build("llama")
        model.config.attention_dropout = 0.1
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1  # draws from the script's generator in training mode
        optimizer = OPTIMIZERS["fused"](model.parameters())
        losses, answers = [], []
        for step in range(3):
            losses.append(train_step(model, optimizer, step))
            for _ in range(2):
                answers.append(evaluate(model).tolist())
            answers.append(model.generate(**BATCH, max_new_tokens=5, do_sample=True).tolist())
        return losses, answers, torch.rand(2).tolist()

    first = train()
    for hits in (3 * 3, 3 * 3 + 3 * 3):
        with evalcache.enable() as session:
            assert train() == first
            # What is computed last before a step may still wait for its check when the weights change: never stored.
            assert session.cache.counts.hits >= hits and set(session.cache.counts.uncacheable) <= {"changed"}


def test_the_mode_is_left_as_it_is_and_training_mode_is_not_served(session):
    model = build("llama")
    served = Served(session.cache)
    served.ask(evaluate, model)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    _, told = served.ask(evaluate, model)
    assert (told.hits, told.misses, told.uncacheable) == (0, 0, {"training": 3})
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    model.eval()
    _, told = served.ask(evaluate, model)
    assert told.hits == 3


def test_gradients_that_wait_for_their_step_change_nothing(session):
    model = build("llama")
    served = Served(session.cache)
    first, _ = served.ask(evaluate, model)
    ids = BATCH["input_ids"]
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    model.eval()
    held = [parameter.grad.clone() for parameter in model.parameters()]
    _, told = served.ask(evaluate, model)  # in the middle of an accumulation
    assert told.hits == 3
    assert all(torch.equal(one.grad, other) for one, other in zip(model.parameters(), held, strict=True))
    for parameter in model.parameters():
        parameter.data.sub_(0.5 * parameter.grad)  # past the version counter
    changed, told = served.ask(evaluate, model)
    assert told.misses == 3 and torch.equal(changed, bare(model)) and not torch.equal(changed, first)


class Evaluate(TrainerCallback):
    """Asks the model after each step, as one does who wants to see it learn."""

    def __init__(self, served):
        self.served = served
        self.told = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        mode = model.training
        model.eval()
        for _ in range(2):
            answer, told = self.served.ask(evaluate, model)
            assert torch.equal(answer, bare(model)), "a stale answer"
            self.told.append((told.hits, told.misses, told.uncacheable))
        model.train(mode)


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, place):
        ids = torch.randint(3, VOCABULARY, (12,), generator=torch.Generator().manual_seed(place))
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_trainer_with_a_callback_that_evaluates(session, tmp_path, gradient_checkpointing):
    model = build("llama")
    callback = Evaluate(Served(session.cache))
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=2, learning_rate=0.02,
        optim="adamw_torch_fused", use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no",
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=Sentences(), callbacks=[callback]).train()
    assert callback.told == [(0, 3, {}), (3, 0, {})] * 3
    model.eval()
    _, told = callback.served.ask(evaluate, model)
    assert told.hits == 3, "the last step's model is the trained one"


def test_a_trainer_that_predicts_with_generate(session, tmp_path):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    model = build("t5")
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, per_device_eval_batch_size=4,
        learning_rate=0.02, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no",
        predict_with_generate=True, generation_max_length=8, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    said = []
    trainer = Seq2SeqTrainer(
        model=model, args=arguments, train_dataset=Sentences(), eval_dataset=Sentences(),
        compute_metrics=lambda predicted: said.append(predicted.predictions) or {},
    )  # fmt: skip
    trainer.train()
    counts = session.cache.counts
    assert counts.hits == 0 and counts.misses and set(counts.uncacheable) <= {"changed"}
    trainer.evaluate()
    trainer.evaluate()
    assert counts.hits >= 8 and (said[-1] == said[-3]).all()


SCRIPT = """
import torch
from tiny import VOCABULARY, build, prompts

torch.manual_seed(0)
model = build("llama")
optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)
for step in range(3):
    model.train()
    ids = torch.randint(3, VOCABULARY, (2, 12))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    for seed in range(3):
        print(model.generate(**prompts(4, seed=seed), max_new_tokens=5, do_sample=False).tolist())
"""


def test_a_training_that_is_run_again_hits_at_every_step(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(__file__).rpartition("/")[0])
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    plain = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert plain.returncode == 0, plain.stderr
    told = []
    for _ in range(2):
        command = [sys.executable, "-m", "evalcache", "run", "--", sys.executable, str(script)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (0, plain.stdout), done.stderr
        told.append(int(re.match(r"evalcache: (\d+) hits", done.stderr.splitlines()[-1])[1]))
    # Of three batches a step, the last may still wait for its check when the weights change.
    assert told[0] == 0 and told[1] >= 2 * 4 * 3, told
