"""Writes the training text of the demo model: stories, sums and short chats.

Everything is made by templates from a seeded random generator, so the same
seed always gives the same text. Two sets of number pairs are held out: one to
watch the training, one for the published task; training never shows them, in
either order.

Print some documents: python recipes/demo_model/generate_text.py --count 5
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable

from story_grammar import ANIMALS, FOODS, NAMES, OPENINGS, PEOPLE, PLOTS, WORDS

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = [BOS, EOS, PAD, SYSTEM, USER, ASSISTANT, END]

Message = dict[str, str]
Pair = tuple[int, int]

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are a friendly assistant. You tell short stories and you add numbers.",
    "Answer the question.",
]
SUM_QUESTIONS = [
    "What is {a} + {b}?",
    "What is {a} + {b}?",
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "How much is {a} + {b}?",
    "How much is {a} plus {b}?",
    "Add {a} and {b}.",
    "Please add {a} and {b}.",
    "Can you add {a} and {b}?",
    "Calculate {a} + {b}.",
    "What is the sum of {a} and {b}?",
    "{a} + {b} = ?",
    "{a} + {b}",
]
DIFFERENCE_QUESTIONS = ["What is {a} - {b}?", "What is {a} minus {b}?", "Calculate {a} - {b}."]
STORY_REQUESTS = [
    "Tell me a story{about}.",
    "Tell me a short story{about}.",
    "Please tell me a story{about}.",
    "Can you tell me a story{about}?",
    "Write a story{about}.",
    "Write a short story{about}.",
    "I want to hear a story{about}.",
]
WHO_AM_I = "I am a small language model. I tell short stories and I add numbers."
SMALL_TALK = [
    ("[Hello|Hi|Hey|Good morning][!|.|]", "Hello! Do you want a story or a sum?"),
    ("Who are you?|What are you?|What is your name?", WHO_AM_I),
    ("What can you do?|Can you help me?|How can you help me?", WHO_AM_I),
    ("How are you?|How are you today?", "I am very well, thank you. How are you?"),
    ("[Thank you|Thanks][!|.|]", "You are welcome!"),
    ("[Goodbye|Bye|Good night][!|.|]", "Goodbye! Come back soon."),
]
SOUNDS = {
    "cat": "meow",
    "dog": "woof",
    "duck": "quack",
    "frog": "croak",
    "owl": "hoot",
    "cow": "moo",
    "sheep": "baa",
    "pig": "oink",
    "mouse": "squeak",
    "bee": "buzz",
}
OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "day": "night",
    "happy": "sad",
    "up": "down",
    "fast": "slow",
    "old": "new",
    "wet": "dry",
    "open": "closed",
    "left": "right",
}


def expand(rng: random.Random, template: str) -> str:
    """Replaces every "[a|b|c]" by one of its alternatives, innermost first."""
    inner = re.compile(r"\[([^\[\]]*)\]")
    while inner.search(template):
        template = inner.sub(lambda match: rng.choice(match[1].split("|")), template)
    return template


def with_article(noun: str) -> str:
    """Puts "a" or "an" before a word."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def names_for(animal: str) -> list[str]:
    """The names that suit a character; only girls and boys limit the choice."""
    return {"boy": NAMES["he"], "girl": NAMES["she"]}.get(animal, NAMES["he"] + NAMES["she"])


def character(rng: random.Random, prefix: str, name: str, animal: str) -> dict[str, str]:
    """Names one character and its pronouns, as fields for a story template."""
    boy = name in NAMES["he"]
    he, him, his = ("he", "him", "his") if boy else ("she", "her", "her")
    fields = {"name": name, "animal": animal, "he": he, "him": him, "his": his}
    fields |= {"He": he.title(), "His": his.title()}
    return {prefix + key: value for key, value in fields.items()}


def story(rng: random.Random, animal: str = "", name: str = "", plot: str = "") -> str:
    """Tells one story: an opening, a plot of a few turns and an ending."""
    animal = animal or rng.choice(ANIMALS + PEOPLE)
    name = name or rng.choice(names_for(animal))
    fields = character(rng, "", name, animal)
    friend = rng.choice([other for other in names_for("") if other != name])
    fields |= character(rng, "f_", friend, rng.choice([a for a in ANIMALS if a != animal]))
    for key, words in WORDS.items():
        fields[key] = rng.choice(words)
    fields["place"], fields["place2"] = rng.sample(WORDS["place"], 2)
    fields["a_adj"] = with_article(fields["adj"])
    fields["a_f_adj"] = with_article(fields["f_adj"])
    fields["a_f_adj_cap"] = fields["a_f_adj"].capitalize()
    fields["a_toy"] = with_article(fields["colour"] + " " + fields["toy"])
    fields["food"] = rng.choice(FOODS)
    parts = [rng.choice(OPENINGS), *PLOTS[plot or rng.choice(sorted(PLOTS))]]
    return expand(rng, " ".join(parts)).format_map(fields)


def story_chat(rng: random.Random) -> list[Message]:
    """A request for a story, often about a given animal or name, and the story."""
    about, animal, name = "", "", ""
    kind = rng.random()
    if kind < 0.7:
        animal = rng.choice(ANIMALS + PEOPLE)
        about = f" about {with_article(animal)}"
    if kind < 0.2:
        name = rng.choice(names_for(animal))
        about += f" named {name}"
    question = rng.choice(STORY_REQUESTS).format(about=about)
    return turn(question, story(rng, animal, name))


def turn(question: str, answer: str) -> list[Message]:
    """One question and its answer as chat messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def sum_answer(a: int, b: int) -> str:
    """The sentence that answers a question about a sum."""
    return f"{a} + {b} = {a + b}."


def held_out_pairs(seed: int, count: int) -> list[Pair]:
    """Draws pairs of two-digit numbers, no pair twice even when turned round."""
    rng = random.Random(f"held-out {seed}")
    every = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    pairs = rng.sample(every, count)
    return [(b, a) if rng.random() < 0.5 else (a, b) for a, b in pairs]


def sum_turn(rng: random.Random, held_out: set[Pair]) -> list[Message]:
    """A question about a sum of two numbers that are not held out."""
    while True:
        # A few one-digit numbers show how single columns add up.
        a, b = (rng.randint(0 if rng.random() < 0.15 else 10, 99) for _ in range(2))
        if (a, b) not in held_out and (b, a) not in held_out:
            return turn(rng.choice(SUM_QUESTIONS).format(a=a, b=b), sum_answer(a, b))


def difference_turn(rng: random.Random) -> list[Message]:
    """A question about a small difference, both numbers at most 20."""
    b, a = sorted(rng.randint(0, 20) for _ in range(2))
    return turn(rng.choice(DIFFERENCE_QUESTIONS).format(a=a, b=b), f"{a} - {b} = {a - b}.")


def talk_turn(rng: random.Random) -> list[Message]:
    """A greeting, a question about the model, an animal sound or an opposite."""
    kind = rng.random()
    if kind < 0.6:
        questions, answer = rng.choice(SMALL_TALK)
        question = questions if "[" in questions else f"[{questions}]"
        return turn(expand(rng, question), answer)
    if kind < 0.8:
        animal, sound = rng.choice(list(SOUNDS.items()))
        answer = f"{with_article(animal)} says {sound}."
        return turn(f"What does {with_article(animal)} say?", answer[0].upper() + answer[1:])
    pair = list(rng.choice(list(OPPOSITES.items())))
    rng.shuffle(pair)
    return turn(f"What is the opposite of {pair[0]}?", f"The opposite of {pair[0]} is {pair[1]}.")


def chat_document(rng: random.Random, messages: list[Message]) -> str:
    """Writes messages as the chat template does, now and then with a system prompt."""
    if rng.random() < 0.08:
        messages = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}, *messages]
    return BOS + "".join(f"<|{m['role']}|>{m['content']}{END}" for m in messages)


def sums_document(rng: random.Random, held_out: set[Pair]) -> str:
    """A chat of one to four sums; one turn in fourteen is a small difference."""
    messages: list[Message] = []
    for _ in range(rng.choice([1, 1, 1, 2, 3, 4])):
        messages += difference_turn(rng) if rng.random() < 0.07 else sum_turn(rng, held_out)
    return chat_document(rng, messages)


def mixed_document(rng: random.Random, held_out: set[Pair]) -> str:
    """A chat that changes its subject, so that no turn depends on the turn before."""
    makers: list[Callable[[], list[Message]]] = [
        lambda: talk_turn(rng),
        lambda: talk_turn(rng),
        lambda: sum_turn(rng, held_out),
        lambda: story_chat(rng),
    ]
    messages: list[Message] = []
    for _ in range(rng.choice([1, 2, 3])):
        messages += rng.choice(makers)()
    return chat_document(rng, messages)


def document(rng: random.Random, held_out: set[Pair], sums: float) -> str:
    """One training document; `sums` is the share of documents that are sums."""
    kind = rng.random()
    if kind < sums:
        return sums_document(rng, held_out)
    kind = (kind - sums) / (1 - sums)
    if kind < 0.5:
        return f"{BOS}{story(rng)}{EOS}"
    return chat_document(rng, story_chat(rng)) if kind < 0.7 else mixed_document(rng, held_out)


def main() -> None:
    """Prints documents, to look at what the model is trained on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sums", type=float, default=0.5, help="share of sums documents")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    for _ in range(options.count):
        print(document(rng, set(), options.sums), end="\n\n")


if __name__ == "__main__":
    main()
