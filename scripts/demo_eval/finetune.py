"""Trains the last layer of a model for a few steps and leaves the others as they are: python finetune.py MODEL_DIR TUNED_DIR"""

from __future__ import annotations

import argparse
from pathlib import Path

from corpus import read_docstrings, split
from train import encode_all, train
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("tuned", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).requires_grad_(False)
    last_layer = list(model.model.layers[-1].requires_grad_(True).parameters())
    train(model, encode_all(tokenizer, split(read_docstrings())[0]), arguments.steps, last_layer, rate=1e-3)
    tokenizer.save_pretrained(arguments.tuned)
    model.save_pretrained(arguments.tuned)


if __name__ == "__main__":
    main()
