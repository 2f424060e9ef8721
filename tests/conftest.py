"""What all tests share: one thread per process, a checkpoint from outside of the repository, one compiled artifact.

Compiling is the slow part of every test run, so there is one artifact per session, built by the command line as a user
would, and whoever needs engines takes it or a copy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
STORIES = ROOT.parent / "shared" / "models" / "stories260K"

# Tensors here are tiny, and threads that wait for each other cost more than they bring. It has to be set before torch
# or a kernel library starts its threads; child processes inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

# What tests build is remembered in a folder of its own, and the keys that the user trusts are not looked at.
_HOME = tempfile.TemporaryDirectory(prefix="ingot-test-home-")
os.environ["XDG_STATE_HOME"] = os.environ["XDG_CONFIG_HOME"] = _HOME.name

SENTENCES = (
    "Once upon a time there was a little robot who liked to count the stars.",
    "The quick brown fox jumps over the lazy dog; naïve café — “quotes”.",
    "Ein kleiner Bär läuft über die Brücke. 你好，世界。 😀👩‍👩‍👧",
)
TEMPLATE = (
    "{% for message in messages %}{% if message.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}"
    "{{ bos_token }}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
RECIPE = """
name = "tiny"
[model]
path = "model"
max_length = 128
[shapes]
decode_batch_sizes = [1, 4]
prefill_lengths = [16]
kv_block_size = 8
[gate]
prompts = ["Once upon a time", "The quick brown fox", "你好，世界。"]
max_tokens = 16
"""
CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def run_ingot(*words: object, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess[str]:
    """`ingot WORDS` in a process of its own, with text output captured."""
    command = [sys.executable, "-m", "ingot.compiler.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **options)


@dataclass(frozen=True)
class Demo:
    """One small random Llama and the artifact that was built of it: decode 1 and 4, prefill 16, max_length 128."""

    recipe: Path
    model: Path
    artifact: Path
    build: subprocess.CompletedProcess[str]

    def copy(self, folder: Path) -> Path:
        """A copy of the artifact, to be damaged."""
        return Path(shutil.copytree(self.artifact, folder))


def make_demo(folder: Path, *flags: object) -> Demo:
    """A small random Llama with tokenizer and recipe in `folder`, built by the command line."""
    from ingot.compiler.families import save_random_model

    folder.mkdir(exist_ok=True)
    save_random_model(CONFIG, folder / "model")
    _tokenizer().save(str(folder / "model" / "tokenizer.json"))
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    (folder / "model" / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (folder / "recipe.toml").write_text(RECIPE, "utf-8")
    build = run_ingot("build", folder / "recipe.toml", "-o", folder / "artifact", *flags, timeout=900)
    return Demo(folder / "recipe.toml", folder / "model", folder / "artifact", build)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Takes back what a test does to torch's threads."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The session's own cache folder, where builds without --cache-dir keep theirs: never the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "ingot"


@pytest.fixture(scope="session")
def ingot() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line in a process of its own: see `run_ingot`."""
    return run_ingot


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, cache_folder: Path) -> Demo:
    """The session's artifact with its recipe and checkpoint. Nobody may change any of them."""
    made = make_demo(tmp_path_factory.mktemp("demo"))
    if made.build.returncode:
        said = f"exit code {made.build.returncode}:\n{made.build.stderr}"
        pytest.fail(f"the session's artifact cannot be built, {said}", False)
    return made


@pytest.fixture(scope="session")
def demo_artifact(demo: Demo) -> Path:
    """The session's artifact alone."""
    return demo.artifact


@pytest.fixture(scope="session")
def stories() -> Path:
    """The folder of the checkpoint stories260K, which is not in the repository; without it the test is skipped."""
    folder = Path(os.environ.get("INGOT_STORIES260K", STORIES))
    if not (folder / "config.json").is_file():
        pytest.skip("needs the checkpoint stories260K: put it at ../shared/models, or set INGOT_STORIES260K=DIR")
    return folder


def _tokenizer() -> Any:
    """A byte-level BPE of 320 tokens that puts <s> before a text; <pad>, <s> and </s> are 0, 1 and 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer
