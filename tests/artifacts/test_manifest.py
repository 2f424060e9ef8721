"""The manifest's parser is total and strict, its JSON canonical, and its schema fixed by a golden file."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ingot.artifacts.errors import VerificationError
from ingot.artifacts.manifest import SCHEMA_VERSION, Manifest, load_manifest

MISSING = object()


def put(tree: Any, path: str, value: Any) -> str:
    """The tree as JSON with the value at "a.0.b" replaced, or removed if MISSING."""
    tree = copy.deepcopy(tree)
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    at = tree
    for part in parents:
        at = at[part]
    if value is MISSING:
        del at[last]
    else:
        at[last] = value
    return json.dumps(tree)


def refusal(text: str | bytes) -> VerificationError:
    with pytest.raises(VerificationError) as caught:
        Manifest.from_json(text)
    assert caught.value.fix
    return caught.value


def test_golden_file_parses_and_comes_back_byte_for_byte(golden_text: str) -> None:
    manifest = Manifest.from_json(golden_text)
    assert manifest.engines[2].inputs[0].shape == (1, 128)
    assert manifest.kv_cache.layers[1].window == 128
    assert manifest.to_json() == golden_text
    assert manifest.native_code() == {
        "engines/decode-b1.so",
        "engines/decode-b4.so",
        "engines/prefill-c128.so",
        "engines/kernels.so",
    }


def test_canonical_json_and_digest_do_not_depend_on_order_or_spacing(golden: dict[str, Any], golden_text: str) -> None:
    shuffled = json.dumps(dict(reversed(golden.items())), indent=7)
    assert Manifest.from_json(shuffled).to_json() == golden_text
    assert Manifest.from_json(shuffled).digest() == Manifest.from_json(golden_text).digest()
    other = Manifest.from_json(put(golden, "files.0.size", 1))
    assert other.digest() != Manifest.from_json(golden_text).digest()


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("engines.2.inputs.0.shape", "1", "engines[2].inputs[0].shape"),
        ("engines.2.inputs.0.shape.1", True, "engines[2].inputs[0].shape[1]"),
        ("engines.2.inputs.0.shape.1", -1, "engines[2].inputs[0].shape[1]"),
        ("engines.2.inputs.0.shape", [1] * 9, "engines[2].inputs[0].shape"),
        ("engines.0.inputs.0.dtype", "float33", "engines[0].inputs[0].dtype"),
        ("engines.0.name", "../x", "engines[0].name"),
        ("engines.0.phase", "train", "engines[0].phase"),
        ("engines.0.kind", "pickle", "engines[0].kind"),
        ("engines.0.memory_bytes", -1, "engines[0].memory_bytes"),
        ("engines.0.memory_bytes", MISSING, "engines[0].memory_bytes"),
        ("engines.0.batch", 10**9, "engines[0].batch"),
        ("engines.0.batch", 1.0, "engines[0].batch"),
        ("engines.0.length", 2, "engines[0].length"),
        ("engines.2.batch", 2, "engines[2].batch"),
        ("engines.1.name", "decode-b1", "engines[1].name"),
        ("engines.0.file", "engines/other.so", "engines[0].file"),
        ("engines.0.file", "/etc/passwd", "engines[0].file"),
        ("engines.0.libraries.0", "engines/other.so", "engines[0].libraries[0]"),
        ("engines.0.constants.1.symbol", "model_embed_tokens_weight", "engines[0].constants[1].symbol"),
        ("engines.0.inputs.1.name", "tokens", "engines[0].inputs[1].name"),
        ("engines.0.surprise", 1, "engines[0].surprise"),
        ("engines", {}, "engines"),
        ("weights.0", "weights/other.safetensors", "weights[0]"),
        ("weights", ["weights/model.safetensors"] * 2, "weights[1]"),
        ("files.0.size", -1, "files[0].size"),
        ("files.0.size", 10**18, "files[0].size"),
        ("files.0.size", None, "files[0].size"),
        ("files.0.sha256", "0" * 63, "files[0].sha256"),
        ("files.0.sha256", "0" * 64 + "\n", "files[0].sha256"),
        ("files.0.sha256", "A" * 64, "files[0].sha256"),
        ("files.0.sha256", MISSING, "files[0].sha256"),
        ("files.0.path", "engines/decode-b1.so", "files[1].path"),
        ("files.0.path", "ENGINES/DECODE-B1.SO", "files[1].path"),
        ("files.0.path", "manifest.json", "files[0].path"),
        ("files.0.path", "report/build.log", "files[0].path"),
        ("files.0.path", "engines", "files[1].path"),
        ("model.num_layers", 0, "model.num_layers"),
        ("model.num_layers", 10**12, "model.num_layers"),
        ("model.vocab_size", "512", "model.vocab_size"),
        ("model", MISSING, "model"),
        ("model", None, "model"),
        ("model.max_length", 513, "kv_cache.max_blocks"),
        ("kv_cache.max_blocks", 33, "kv_cache.max_blocks"),
        ("kv_cache.num_blocks", 32, "kv_cache.num_blocks"),
        ("kv_cache.layers.0.key", [1], "kv_cache.layers[0].key"),
        ("kv_cache.layers.0.key", [1, 2, 3], "kv_cache.layers[0].key"),
        ("toolchain.torch", 2.13, "toolchain.torch"),
        ("recipe", [], "recipe"),
        ("passes.0", "x", "passes[0]"),
        ("gate", "passed", "gate"),
        ("target.host_library", "libc", "target.host_library"),
        ("name", "a\nb", "name"),
        ("unknown key", 1, "unknown key"),
        ("schema_version", True, "schema_version"),
        ("schema_version", "1", "schema_version"),
        ("schema_version", 0, "schema_version"),
        ("schema_version", MISSING, "schema_version"),
    ],
)
def test_a_bad_field_is_refused_by_name(golden: dict[str, Any], path: str, value: Any, named: str) -> None:
    error = refusal(put(golden, path, value))
    assert named in error.what


@pytest.mark.parametrize(
    "path",
    [
        *("", "/a", "a/", "a//b", ".", "..", "./a", "a/..", "../a", "a/../b", "a\\b", "..\\a", "C:/a", "C:", "a\0b"),
        *("~/a", ".hidden", "a/.b", "é", "a b", "a\n", "-rf", "a/b/c/d/e/f/g/h/i", "a" * 300, "con/" * 200),
    ],
)
def test_paths_that_are_not_plainly_inside_are_refused(golden: dict[str, Any], path: str) -> None:
    assert "files[0].path" in refusal(put(golden, "files.0.path", path)).what


def test_a_newer_schema_is_refused_before_any_other_field() -> None:
    error = refusal(json.dumps({"schema_version": SCHEMA_VERSION + 1, "files": "something else by then"}))
    assert "newer Ingot" in error.what
    assert "upgrade" in error.fix


def test_an_older_schema_is_told_to_be_built_again() -> None:
    error = refusal(json.dumps({"schema_version": SCHEMA_VERSION - 1, "files": "as it was then"}))
    assert "older Ingot" in error.what
    assert "build the artifact again" in error.fix


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"{", "not JSON"),
        (b"PK\x03\x04", "not JSON"),
        (b"[]", "object"),
        (b"null", "object"),
        (b'"x"', "object"),
        (b"[" * 1_000_000, "nested"),
        (b'{"a":' * 100_000, "nested"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "nested"),
        (b" " * ((16 << 20) + 1), "16 MiB"),
        (b'{"a": {"b": 1, "b": 1}}', "twice"),
        (b'{"a": [NaN]}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "range of a double"),
        (b'{"a": ' + b"9" * 1_000_000 + b"}", "64 bits"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        ("\ud800", "not JSON"),
    ],
)
def test_broken_json_is_one_clear_error(text: str | bytes, why: str) -> None:
    began = time.monotonic()
    assert why in refusal(text).why
    assert time.monotonic() - began < 5


def test_defects_inside_json_are_named_with_their_place(golden_text: str) -> None:
    assert "kv_cache.layers[1].window" in refusal(golden_text.replace('"window": 128', '"window": NaN')).what
    doubled = golden_text.replace('"window": 128', '"window": 128, "window": 128')
    assert "kv_cache.layers[1]" in refusal(doubled).what


@pytest.mark.parametrize("value", [math.nan, math.inf, object(), {1: 2, "a": 3}])
def test_what_is_no_json_cannot_be_written(manifest: Manifest, value: Any) -> None:
    with pytest.raises(VerificationError):
        dataclasses.replace(manifest, gate={"kl": value}).to_json()


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["..", "/a", "1", "\0"])
)
trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON tree."""
    found: list[tuple[Any, Any]] = []
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for key, item in items:
        found.append((tree, key))
        found += places(item)
    return found


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_mutated_manifest_parses_to_itself_or_is_refused(golden: dict[str, Any], data: st.DataObject) -> None:
    tree = copy.deepcopy(golden)
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(places(tree)))
        if data.draw(st.booleans()):
            container[key] = data.draw(trees)
        else:
            del container[key]
    try:
        manifest = Manifest.from_json(json.dumps(tree))
    except VerificationError:
        return
    assert json.loads(manifest.to_json()) == tree
    assert Manifest.from_json(manifest.to_json()) == manifest


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_bytes_parse_to_themselves_or_are_refused(golden_text: str, data: st.DataObject) -> None:
    text = bytearray(golden_text.encode())
    start = data.draw(st.integers(0, len(text) - 1))
    text[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    try:
        manifest = Manifest.from_json(bytes(text))
    except VerificationError:
        return
    assert json.loads(manifest.to_json()) == json.loads(text)


@given(st.one_of(st.binary(max_size=64), st.text(max_size=64), trees.map(json.dumps)))
def test_random_input_is_always_refused(text: str | bytes) -> None:
    refusal(text)


def test_load_reads_the_file_or_its_folder(tmp_path: Path, golden_text: str) -> None:
    (tmp_path / "manifest.json").write_text(golden_text)
    assert load_manifest(tmp_path) == load_manifest(tmp_path / "manifest.json") == Manifest.from_json(golden_text)


def test_load_neither_follows_links_nor_waits_for_a_fifo(tmp_path: Path, golden_text: str) -> None:
    (tmp_path / "real.json").write_text(golden_text)
    (tmp_path / "link.json").symlink_to("real.json")
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "folder.json").mkdir()
    for name in ("link.json", "fifo.json", "missing.json", "folder.json", "real.json/x"):
        with pytest.raises(VerificationError):
            load_manifest(tmp_path / name)


def test_load_refuses_an_endless_or_huge_file(tmp_path: Path) -> None:
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(VerificationError, match="too large"):
        load_manifest(tmp_path)
    with pytest.raises(VerificationError, match="plain file"):
        load_manifest("/dev/zero")
