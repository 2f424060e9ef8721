"""Measures a demo model folder: exact match on task.jsonl, and sample texts.

    python recipes/demo_model/evaluate.py [--folder DIR]

Loads the folder with transformers, once in float32 and once in bfloat16, and
prints the share of right answers and a few stories and chats.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

STORY_PROMPTS = [
    "Once upon a time",
    "Once upon a time, a shy dragon named Poppy",
    "Once there was a clever mouse",
    "Tom was a small frog.",
    "Once upon a time, there was a girl",
]
CHAT_PROMPTS = [
    "Tell me a story about a cat.",
    "Tell me a story about a boy named Max.",
    "What is 15 - 7?",
    "Hello!",
    "Who are you?",
    "What does a cow say?",
    "What is the opposite of hot?",
]


@torch.inference_mode()
def exact_match(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: list[dict[str, Any]]
) -> tuple[float, list[str]]:
    """Share of items whose greedy answer, stripped, is right, and the wrong answers."""
    prompts = [
        tokenizer.apply_chat_template(item["messages"], add_generation_prompt=True, tokenize=False) for item in items
    ]
    # The template has already written the first special token.
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    wrong = [
        f"{text.strip()} (not {item['answer']})"
        for text, item in zip(answers, items, strict=True)
        if text.strip() != item["answer"]
    ]
    return 1 - len(wrong) / len(items), wrong


@torch.inference_mode()
def continue_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str, temperature: float) -> str:
    """Continues a plain text, special tokens shown; temperature 0 is greedy."""
    inputs = tokenizer(text, return_tensors="pt")
    sampling = {"temperature": temperature, "top_k": 0} if temperature else {}
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=300,
        do_sample=temperature > 0,
        **sampling,
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=False))


@torch.inference_mode()
def chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """Answers one question, greedily."""
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=300,
        do_sample=False,
    )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))


def main() -> None:
    """Prints the exact match for both number types, then sample texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    torch.manual_seed(0)
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    lines = (options.folder / "task.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=dtype).eval()
        share, wrong = exact_match(model, tokenizer, items)
        print(f"{dtype}: exact match {share:.3f} of {len(items)}; wrong: {wrong}")
    for prompt in STORY_PROMPTS:
        for temperature in (0.0, 0.8):
            text = continue_text(model, tokenizer, prompt, temperature)
            print(f"\n[temperature {temperature}] {text}")
    for prompt in CHAT_PROMPTS:
        print(f"\n{prompt}\n{chat(model, tokenizer, prompt)}")


if __name__ == "__main__":
    main()
