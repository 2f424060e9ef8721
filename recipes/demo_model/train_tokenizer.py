"""The tokenizer of the demo model: byte-level BPE, trained on the generated text.

Every digit is a token of its own, and all 256 bytes are in the vocabulary, so
any UTF-8 text survives a round trip.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from generate_text import BOS, EOS, PAD, SPECIAL_TOKENS, document
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TOKENIZER_CLASS = "PreTrainedTokenizerFast"
CHAT_TEMPLATE = (
    "{{- bos_token }}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|' + message['role'] + '|>' + (message['content'] | trim) + '<|end|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|assistant|>' }}\n"
    "{%- endif %}\n"
)


def train_tokenizer(seed: int, vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = random.Random(f"tokenizer {seed}")
    tokenizer.train_from_iterator((document(rng, set(), 0.2) for _ in range(6000)), trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(out: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes the tokenizer under the class name that every version of transformers knows."""
    tokenizer.save_pretrained(out)
    settings_file = out / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text()) | {"tokenizer_class": TOKENIZER_CLASS}
    settings_file.write_text(json.dumps(settings, indent=2) + "\n")
