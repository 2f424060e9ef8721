"""Artifacts with fake engines and a tokenizer trained on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ingot.artifacts.store import ArtifactWriter
from ingot.artifacts.trust import record_build
from ingot.runtime import LLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from .fake_engine import FakeEngineGroup, fake_manifest

SENTENCES = [
    "Once upon a time there was a little robot who liked to count the stars.",
    "The quick brown fox jumps over the lazy dog; naïve café — “quotes”.",
    "Ein kleiner Bär läuft über die Brücke. 你好，世界。 😀👩‍👩‍👧",
] * 4
TEMPLATE = (
    "{% for message in messages %}\n    {% if message.role not in ['user', 'assistant', 'system'] %}\n"
    "{{ raise_exception('unknown role') }}\n{% endif %}\n<|{{ message['role'] }}|>{{ message['content'] }}"
    "{{ eos_token }}\n"
    "{% endfor %}\n{% if add_generation_prompt %}<|assistant|>{% endif %}\n"
)


def byte_level_tokenizer() -> Tokenizer:
    """A byte-level BPE of 320 tokens: <s> is 0, </s> is 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def write_artifact(folder: Path, template: str | None = TEMPLATE, generation: object = None, **shape: object) -> Path:
    """An artifact in `folder` whose engines are fakes; its tokenizer is the byte-level one."""
    with ArtifactWriter(folder) as writer:
        (writer.root / "engines").mkdir()
        (writer.root / "engines/fake.so").write_bytes(b"not code")
        byte_level_tokenizer().save(str(writer.root / "tokenizer.json"))
        if template is not None:
            (writer.root / "chat_template.jinja").write_text(template, encoding="utf-8")
        generation = {"bos_token_id": 0, "eos_token_ids": [1], "defaults": {}} if generation is None else generation
        (writer.root / "generation.json").write_text(json.dumps(generation))
        manifest = writer.commit(fake_manifest(**{"vocab": 320, **shape}))  # type: ignore[arg-type]
    record_build(manifest.digest())
    return folder


@pytest.fixture
def make_llm(tmp_path: Path) -> Iterator[Callable[..., LLM]]:
    """Makes LLMs over fake engines: `make_llm(max_length=…)`; the group is `llm._engines`."""
    made: list[LLM] = []

    def make(**keys: object) -> LLM:
        folder = write_artifact(tmp_path / f"artifact-{len(made)}", **keys)  # type: ignore[arg-type]
        shape = {name: value for name, value in keys.items() if name not in ("template", "generation")}
        group = FakeEngineGroup(fake_manifest(**{"vocab": 320, **shape}))  # type: ignore[arg-type]
        made.append(LLM(folder, engine_group=group))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


@pytest.fixture
def llm(make_llm: Callable[..., LLM]) -> LLM:
    """An LLM over fake engines: max_length 64, blocks of 4 tokens, decode batches 1 and 4, prefill chunks 4 and 8."""
    return make_llm()
