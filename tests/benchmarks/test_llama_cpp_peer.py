"""llama.cpp as a peer: what it is asked, and what is said where it is not installed. The real one is not needed."""

from __future__ import annotations

import ctypes
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ingot.artifacts.errors import ResourceError, UsageError
from ingot.benchmarks import builds, llama_cpp_model, llama_cpp_peer, run, subjects
from ingot.benchmarks.command_line import understand

LLAMA = next(s for s in subjects.SUBJECTS if s.name == "llama-3.2-1b-int4")


def fake_api(fed: list[list[int]], known: str = "model.gguf") -> Any:
    """llama-cpp-python as far as the peer uses it: the next token is the last one plus 1, modulo 8."""

    def decode(context: Any, batch: Any) -> int:
        fed.append(list(batch[0])[: batch[1]])
        return int(len(fed[-1]) > 4)

    def logits(context: Any, index: int) -> Any:
        row = np.zeros(8, np.float32)
        row[(fed[-1][-1] + 1) % 8] = 1
        fed_logits.append(row)
        return row.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    fed_logits: list[Any] = []
    nothing = lambda *_: None  # noqa: E731
    return SimpleNamespace(
        llama_log_callback=lambda f: f, llama_log_set=nothing, llama_backend_init=nothing,
        llama_model_default_params=SimpleNamespace, llama_context_default_params=lambda: SimpleNamespace(n_batch=2),
        llama_model_load_from_file=lambda name, params: name.decode() == known, llama_init_from_model=lambda m, p: p,
        llama_model_get_vocab=nothing, llama_vocab_n_tokens=lambda v: 8, llama_token=ctypes.c_int32,
        llama_batch_get_one=lambda tokens, n: (tokens, n), llama_decode=decode, llama_get_logits_ith=logits,
        llama_get_memory=nothing, llama_memory_clear=lambda memory, data: fed.append([]),
    )  # fmt: skip


def test_every_run_starts_with_an_empty_context(monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[list[int]] = []
    monkeypatch.setitem(sys.modules, "llama_cpp", fake_api(fed))
    peer = llama_cpp_peer.Peer("model.gguf", 64)
    assert peer.decode({"prompt": [3, 4], "tokens": 2})["token_ids"] == [5, 6, 7]
    assert fed == [[], [3, 4], [5], [6]]
    assert peer.prefill({"prompt": [6, 7]})["token_ids"] == [0]
    assert fed[4:] == [[], [6, 7]]
    with pytest.raises(ResourceError, match="5 more tokens"):
        peer.prefill({"prompt": [1] * 5})
    with pytest.raises(ResourceError, match=r"other\.gguf"):
        llama_cpp_peer.Peer("other.gguf", 64)


def test_without_it_the_peer_is_left_out_with_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = builds.open_recipe(LLAMA, None)
    (tmp_path / "gguf.py").write_text("raise ImportError('no such thing here')")
    options = run.Options(tmp_path, None, ("llama.cpp",), 1, llama_cpp=tmp_path)
    with pytest.raises(ResourceError, match="not installed, and was left out") as caught:
        run.gguf_file(LLAMA, recipe, options, print)
    assert "no such thing here" in str(caught.value) and "pip install --target" in caught.value.fix


def test_a_file_is_made_once_with_the_subjects_type(tmp_path: Path) -> None:
    recipe = builds.open_recipe(LLAMA, None)
    (tmp_path / "llama_cpp.py").write_text("")
    (tmp_path / "gguf.py").write_text("raise_later = 1")
    options = run.Options(tmp_path, None, ("llama.cpp",), 1, llama_cpp=tmp_path)
    with pytest.raises(ResourceError, match=r"int4\.Q4_0\.gguf could not be made"):
        run.gguf_file(LLAMA, recipe, options, lambda _: None)
    (tmp_path / "llama-3.2-1b-int4.Q4_0.gguf").write_bytes(b"")
    file, extra = run.gguf_file(LLAMA, recipe, options, print)
    assert file.name == "llama-3.2-1b-int4.Q4_0.gguf" and extra["PYTHONPATH"].startswith(str(tmp_path))


def test_other_shapes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", SimpleNamespace())
    config = json.loads(builds.open_recipe(LLAMA, None).config_path().read_text())
    for odd in ({"model_type": "gpt2"}, {**config, "tie_word_embeddings": False}):
        with pytest.raises(ValueError, match="only Llama configs with tied embeddings"):
            llama_cpp_model.write(odd, "Q4_0", tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not hold llama-cpp-python"):
        understand(["--llama-cpp", str(tmp_path)])
    (tmp_path / "llama_cpp").mkdir()
    assert understand(["--llama-cpp", str(tmp_path)]).options.peers == ("transformers", "llama.cpp")
    assert understand(["--llama-cpp", str(tmp_path), "--peers", "llama.cpp"]).options.peers == ("llama.cpp",)
    with pytest.raises(UsageError, match="CPU only"):
        understand(["--device", "cuda", "--peers", "llama.cpp"])


def test_subjects_of_all_three_types_are_there() -> None:
    assert {s.gguf for s in subjects.SUBJECTS} >= {"BF16", "Q8_0", "Q4_0"}
    assert all(replace(s, gguf="") == s for s in subjects.SUBJECTS if s.device == "cuda")
