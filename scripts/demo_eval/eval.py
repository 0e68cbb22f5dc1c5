"""An ordinary evaluation, which knows nothing of evalcache: python eval.py MODEL_DIR

Lets the model go on with each text, takes the choice that its words are most like, and prints every answer and the score.
"""

import argparse
import json
from difflib import SequenceMatcher
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def choose(completion: str, choices: list[str]) -> int:
    def likeness(choice: str) -> tuple[bool, float]:
        same_start = completion.split()[:1] == choice.split()[:1]
        return same_start, SequenceMatcher(None, completion[: len(choice)], choice, autojunk=False).ratio()

    return max(range(len(choices)), key=lambda index: likeness(choices[index]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--questions", type=Path, help="default: questions.json beside the model's folder")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()

    questions = json.loads((arguments.questions or arguments.model.parent / "questions.json").read_text(encoding="utf-8"))
    questions = questions[: arguments.limit]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)

    completions: list[str] = []
    for start in range(0, len(questions), arguments.batch_size):
        contexts = [question["context"] for question in questions[start : start + arguments.batch_size]]
        inputs = tokenizer(contexts, return_tensors="pt", padding=True, return_token_type_ids=False)
        with torch.no_grad():
            outputs = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        completions += tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    right = first_words = 0
    for number, (question, completion) in enumerate(zip(questions, completions, strict=True), start=1):
        choice = choose(completion.strip(), question["choices"])
        right += choice == question["answer"]
        first_words += completion.split()[:1] == question["choices"][question["answer"]].split()[:1]
        print(f"{number:4d} {'right' if choice == question['answer'] else 'wrong'} {completion!r}")
    print(f"accuracy {right / len(questions):.3f} (chance 0.250), next word right {first_words / len(questions):.3f}")
    print(f"questions {len(questions)}")


if __name__ == "__main__":
    main()
