"""Trains the demo model on generated text and writes it as a Hugging Face folder.

One command makes everything anew (tokenizer, weights, held-out task, report):

    python recipes/demo_model/train.py --out DIR

It runs on one CPU core in about 40 minutes; training is seeded.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from evaluate import continue_text, exact_match
from generate_text import (
    ASSISTANT,
    END,
    SUM_QUESTIONS,
    USER,
    Pair,
    document,
    held_out_pairs,
    sum_answer,
)
from train_tokenizer import save_tokenizer, train_tokenizer
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

IGNORED = -100  # the label that the loss of transformers leaves out


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Builds the untrained model."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)],
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


class Rows:
    """An endless stream of training rows, each filled up with whole documents."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, held_out: set[Pair], seed: int):
        self.tokenizer = tokenizer
        self.held_out = held_out
        self.rng = random.Random(f"train {seed}")
        self.user, self.assistant = tokenizer.convert_tokens_to_ids([USER, ASSISTANT])

    def row(self, length: int, sums: float) -> tuple[list[int], list[int]]:
        """One row of token ids and its labels; the last document may be cut."""
        ids: list[int] = []
        while len(ids) < length:
            text = document(self.rng, self.held_out, sums)
            ids += self.tokenizer.encode(text, add_special_tokens=False)
        ids = ids[:length]
        labels, asked = [], False
        for token in ids:
            # The numbers of a question cannot be guessed, so they teach nothing.
            labels.append(IGNORED if asked else token)
            asked = (asked or token == self.user) and token != self.assistant
        return ids, labels

    def batch(self, rows: int, length: int, sums: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Several rows as tensors."""
        ids, labels = zip(*(self.row(length, sums) for _ in range(rows)), strict=True)
        return torch.tensor(ids), torch.tensor(labels)


class Stage(NamedTuple):
    """One part of the training, with an optimizer of its own."""

    steps: int
    horizon: int  # the step at which the cosine of the learning rate would end
    learning_rate: float
    sums: tuple[float, float]  # share of sums documents before and after half of the horizon
    long_rows: float  # share of the horizon after which the rows are twice as long


# A document of sums is about a third as long as a story. Adding up needs the most
# examples and comes first; keeping names and things apart in a story comes second.
STAGES = (
    Stage(steps=1200, horizon=1750, learning_rate=2.5e-3, sums=(0.93, 0.8), long_rows=1.0),
    Stage(steps=1000, horizon=1000, learning_rate=2e-3, sums=(0.4, 0.4), long_rows=0.85),
)


def schedule(stage: Stage) -> Iterator[tuple[int, float, float, int, int]]:
    """Yields step, learning rate, share of sums, rows and row length."""
    warm_up = stage.horizon // 30
    for step in range(stage.steps):
        done = step / stage.horizon
        rate = min((step + 1) / warm_up, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        rows, length = (12, 256) if done < stage.long_rows else (6, 512)
        yield step, rate * stage.learning_rate, stage.sums[done >= 0.5], rows, length


def task_items(pairs: list[Pair], seed: int) -> list[dict[str, object]]:
    """Turns held-out pairs into chat questions with their exact answers."""
    rng = random.Random(f"task {seed}")
    items: list[dict[str, object]] = []
    for a, b in pairs:
        question = rng.choice(SUM_QUESTIONS).format(a=a, b=b)
        messages = [{"role": "user", "content": question}]
        items.append({"messages": messages, "answer": sum_answer(a, b)})
    return items


def save(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes model, tokenizer and generation settings, the weights in bfloat16."""
    halved = LlamaForCausalLM(model.config).to(torch.bfloat16)
    halved.load_state_dict(model.state_dict())
    halved.config.dtype = torch.bfloat16
    halved.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
    )
    halved.save_pretrained(out)
    save_tokenizer(out, tokenizer)


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW, without weight decay for the norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def train_stage(
    stage: Stage,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    data: Rows,
    watched: list[dict[str, object]],
    out: Path,
) -> None:
    """Trains one stage; saves the model and measures it every 100 steps."""
    optimizer = make_optimizer(model)
    model.train()
    start = time.monotonic()
    for step, rate, sums, rows, length in schedule(stage):
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, labels = data.batch(rows, length, sums)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            seconds = time.monotonic() - start
            print(f"step {step} loss {loss.item():.4f} {seconds:.0f} s", flush=True)
        if step % 100 == 99 or step == stage.steps - 1:
            model.eval()
            save(out, model, tokenizer)
            share, _ = exact_match(model, tokenizer, watched)
            print(f"watched sums, exact match: {share:.3f}")
            print(continue_text(model, tokenizer, "Once upon a time", 0.0), flush=True)
            model.train()


def main() -> None:
    """Trains in stages, watches a second held-out set on the way, and reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first-stage", type=int, default=1, help="2 goes on from the model of stage 1 in --out")
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)

    pairs = held_out_pairs(options.seed, 400)
    task, watched = (task_items(part, options.seed) for part in (pairs[:200], pairs[200:]))
    options.out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(item) + "\n" for item in task)
    (options.out / "task.jsonl").write_text(lines)
    tokenizer = train_tokenizer(options.seed, vocab_size=1024)
    for number, stage in enumerate(STAGES, start=1):
        if number < options.first_stage:
            continue
        if number == 1:
            model = make_model(tokenizer)
        else:
            # From the file, so that a training taken up again gives the same weights.
            model = LlamaForCausalLM.from_pretrained(options.out, dtype=torch.float32)
        print(f"stage {number}, {model.num_parameters():,} parameters", flush=True)
        data = Rows(tokenizer, set(pairs), options.seed + number - 1)
        train_stage(stage, model, tokenizer, data, watched, options.out)
    saved = LlamaForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    share, wrong = exact_match(saved.eval(), tokenizer, task)
    print(f"task, exact match: {share:.3f}; wrong: {wrong}")


if __name__ == "__main__":
    main()
