"""Makes the demo's model, tokenizer and questions out of the standard library's documentation: python train.py FOLDER"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from corpus import make_questions, read_docstrings, split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

QUESTIONS = 640
VOCABULARY = 1024
WIDTH = 96
BATCH = 16
LONGEST_S = 90.0  # on a slow machine the training stops here, with fewer steps than asked for


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, padding on the left, as generation wants it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left")


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.05,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )
    )  # fmt: skip


def train(model: LlamaForCausalLM, tokens: torch.Tensor, steps: int, parameters: list[torch.nn.Parameter], rate: float) -> None:
    """Trains ``parameters`` on random windows of ``tokens``, with a short warm-up and a cosine to zero."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    started = time.monotonic()
    model.train()
    for step in (bar := tqdm(range(steps), desc="training", unit="step")):
        done = max(step / steps, (time.monotonic() - started) / LONGEST_S)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * done))
        starts = torch.randint(0, len(tokens) - WIDTH, (BATCH, 1), generator=generator)
        batch = tokens[starts + torch.arange(WIDTH)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    model.eval()


def encode_all(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts behind one another, each closed by the end token. *Shape*: ``(tokens,) int64``."""
    return torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in [*ids, tokenizer.eos_token_id]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="gets model/ and questions.json")
    parser.add_argument("--steps", type=int, default=700)
    arguments = parser.parse_args()

    trained_on, held_out = split(read_docstrings())
    tokenizer = train_tokenizer(trained_on)
    tokens = encode_all(tokenizer, trained_on)
    model = make_model(tokenizer)
    print(f"{len(trained_on)} texts, {len(tokens)} tokens, {sum(p.numel() for p in model.parameters())} parameters")
    train(model, tokens, arguments.steps, list(model.parameters()), rate=3e-3)

    arguments.folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(arguments.folder / "model")
    model.save_pretrained(arguments.folder / "model")
    # Last, because it says that the rest is whole.
    (arguments.folder / "questions.json").write_text(json.dumps(make_questions(held_out, QUESTIONS), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
