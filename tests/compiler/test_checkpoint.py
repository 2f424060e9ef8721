"""Checkpoints and configs: what is read, and that every broken or hostile one ends in one clear error."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ingot.artifacts.errors import IngotError, ResourceError, UnsupportedModelError, UsageError
from ingot.compiler import config_check, model_source
from ingot.compiler.assets import write_assets
from ingot.compiler.checkpoint import RandomCheckpoint, SafetensorsCheckpoint, check_against
from ingot.compiler.config_check import check_length, check_memory, read_config
from ingot.compiler.recipe import load_recipe
from ingot.compiler.safetensors_header import TensorInfo, read_header
from ingot.compiler.tokenizer_check import check_tokenizer
from safetensors.torch import save_file

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
A, B = torch.arange(6, dtype=torch.float32).view(2, 3), torch.ones(4, dtype=torch.bfloat16)


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with exactly this header (JSON data or raw bytes)."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(shape: list[Any], start: int, stop: int, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards and their index: a in the first, b in the second."""
    save_file({"a": A}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": B}, tmp_path / "model-00002-of-00002.safetensors")
    write_index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    return tmp_path


def refusal(folder: Path) -> UsageError:
    with pytest.raises(UsageError) as caught:
        SafetensorsCheckpoint(folder)
    assert caught.value.fix
    return caught.value


# --- safetensors that are fine ---------------------------------------------------------------------------------------


def test_single_file(tmp_path: Path) -> None:
    tensors = {"a": A, "b": B, "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name] == (tuple(tensor.shape), tensor.dtype)
        torch.testing.assert_close(checkpoint.load(name), tensor, rtol=0, atol=0)


def test_shards(shards: Path) -> None:
    checkpoint = SafetensorsCheckpoint(shards)
    torch.testing.assert_close(checkpoint.load("b"), B)
    torch.testing.assert_close(checkpoint.load("a"), A)
    checkpoint.close()
    torch.testing.assert_close(checkpoint.load("a"), A)


def test_digest_follows_the_content(shards: Path) -> None:
    before = SafetensorsCheckpoint(shards).digest()
    assert before == SafetensorsCheckpoint(shards).digest()
    save_file({"b": B * 2}, shards / "model-00002-of-00002.safetensors")
    assert SafetensorsCheckpoint(shards).digest() != before


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int8, torch.int64, torch.float16, torch.float64, torch.float8_e4m3fn]
)
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"x": torch.ones(3, 2).to(dtype)}, tmp_path / "model.safetensors")
    assert SafetensorsCheckpoint(tmp_path).load("x").dtype == dtype


def test_hub_cache_links_into_its_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    save_file({"a": A}, repository / "blobs/abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    torch.testing.assert_close(SafetensorsCheckpoint(snapshot).load("a"), A)


# --- threats: Checkpoint, files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth"])
def test_pickles_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(UnsupportedModelError) as caught:
        SafetensorsCheckpoint(tmp_path)
    assert name in caught.value.what
    assert "save_pretrained" in caught.value.fix
    assert caught.value.exit_code == 3


def test_no_weights_and_no_folder(tmp_path: Path) -> None:
    assert "model.safetensors" in refusal(tmp_path).what
    refusal(tmp_path / "none")


def test_missing_shard(shards: Path) -> None:
    (shards / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refusal(shards).what


def test_extra_shard(shards: Path) -> None:
    save_file({"c": A}, shards / "model-00003-of-00003.safetensors")
    assert "model-00003-of-00003.safetensors" in refusal(shards).what


def test_truncated_shard(shards: Path) -> None:
    path = shards / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "bytes of data" in refusal(shards).why


def test_one_tensor_in_two_shards(shards: Path) -> None:
    save_file({"a": A, "b": B}, shards / "model-00002-of-00002.safetensors")
    assert "a is stored twice" in refusal(shards).what


def test_tensor_the_index_does_not_know(shards: Path) -> None:
    save_file({"b": B, "c": B.clone()}, shards / "model-00002-of-00002.safetensors")
    assert "holds c" in refusal(shards).what


def test_tensor_only_the_index_knows(shards: Path) -> None:
    write_index(shards, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors",
                         "c": "model-00002-of-00002.safetensors"})  # fmt: skip
    assert "c is missing" in refusal(shards).what


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", "..", "", 3, None, "x\0.safetensors"]
)
def test_index_that_points_outside(shards: Path, file: Any) -> None:
    write_index(shards, {"a": file})
    assert "index.json names" in refusal(shards).what


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_index_without_a_map(shards: Path, weight_map: Any) -> None:
    write_index(shards, weight_map)
    assert "weight_map" in refusal(shards).what


def test_index_and_single_file_at_once(shards: Path) -> None:
    save_file({"a": A}, shards / "model.safetensors")
    refusal(shards)


def test_shards_without_an_index(shards: Path) -> None:
    (shards / "model.safetensors.index.json").unlink()
    refusal(shards)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_links_out_of_the_folder(tmp_path: Path, name: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_file({"a": A}, tmp_path / "elsewhere")
    (model / name).symlink_to(tmp_path / "elsewhere")
    assert "leaves the model folder" in refusal(model).what


def test_dead_link_and_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("nothing")
    refusal(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    refusal(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    if (dtype == torch.float8_e4m3fn and bad != bad) or dtype != torch.float8_e4m3fn:
        tensor = torch.zeros(1000)
        tensor[777] = bad
        save_file({"w": tensor.to(dtype)}, tmp_path / "model.safetensors")
        with pytest.raises(UsageError, match="w holds NaN or infinity"):
            SafetensorsCheckpoint(tmp_path).load("w")


# --- threats: Checkpoint, header -------------------------------------------------------------------------------------

HEADERS: dict[str, tuple[Any, bytes]] = {
    "rank 9": ({"a": entry([1] * 9, 0, 4)}, bytes(4)),
    "negative size": ({"a": entry([-1], 0, 4)}, bytes(4)),
    "boolean size": ({"a": entry([True], 0, 4)}, bytes(4)),
    "huge size": ({"a": entry([1 << 61, 1 << 61], 0, 4)}, bytes(4)),
    "shape is no list": ({"a": entry(4, 0, 4)}, bytes(4)),  # type: ignore[arg-type]
    "unknown dtype": ({"a": entry([1], 0, 4, "F31")}, bytes(4)),
    "dtype is no text": ({"a": entry([1], 0, 4, ["F32"])}, bytes(4)),
    "span unlike shape": ({"a": entry([2], 0, 4)}, bytes(4)),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "gap": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
    "beyond the end": ({"a": entry([4], 0, 16)}, bytes(4)),
    "more data than tensors": ({"a": entry([1], 0, 4)}, bytes(5)),
    "negative offset": ({"a": entry([1], -4, 0)}, bytes(4)),
    "offsets turned round": ({"a": entry([1], 4, 0)}, bytes(4)),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, bytes(4)),
    "extra field": ({"a": {**entry([1], 0, 4), "x": 1}}, bytes(4)),
    "missing field": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "entry is a list": ({"a": []}, b""),
    "empty name": ({"": entry([1], 0, 4)}, bytes(4)),
    "name with a path": ({"../a": entry([1], 0, 4)}, bytes(4)),
    "name with a newline": ({"a\nb": entry([1], 0, 4)}, bytes(4)),
    "name of 600 characters": ({"a" * 600: entry([1], 0, 4)}, bytes(4)),
    "metadata is no text": ({"__metadata__": {"a": 1}}, b""),
    "a name twice": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', bytes(4)),
    "no JSON": (b"{", b""),
    "no object": (b"[]", b""),
    "not UTF-8": (b'{"\xff":1}', b""),
    "deeply nested": (b'{"a":' + b"[" * 100_000, b""),
    "a number of 5000 digits": (b'{"a":' + b"9" * 5000 + b"}", b""),
}


@pytest.mark.parametrize("case", HEADERS)
def test_broken_headers(tmp_path: Path, case: str) -> None:
    write_raw(tmp_path / "model.safetensors", *HEADERS[case])
    assert "model.safetensors" in refusal(tmp_path).what


@pytest.mark.parametrize("length", [25_000_001, 1 << 63, (1 << 64) - 1])
def test_header_over_25_mb(tmp_path: Path, length: int) -> None:
    path = write_raw(tmp_path / "model.safetensors", b"{}", length=length)
    with path.open("r+b") as file:
        file.truncate(26_000_000)
    assert "header claims" in refusal(tmp_path).why


@pytest.mark.parametrize("size", range(9))
def test_files_shorter_than_a_header(tmp_path: Path, size: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * size)
    refusal(tmp_path)


FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
NUMBERS = st.one_of(st.integers(-2, 20), st.integers(), st.floats(), st.none(), st.booleans())


@FOLDER
@given(
    st.one_of(
        st.binary(max_size=60),
        st.dictionaries(
            st.text(max_size=5),
            st.fixed_dictionaries(
                {
                    "dtype": st.sampled_from(["F32", "U8", "X"]),
                    "shape": st.lists(NUMBERS, max_size=3),
                    "data_offsets": st.lists(NUMBERS, max_size=3),
                }
            ),
            max_size=3,
        ).map(lambda header: json.dumps(header).encode()),
    ),
    st.binary(max_size=20),
)
def test_random_headers_raise_nothing_else(tmp_path: Path, header: bytes, data: bytes) -> None:
    path = write_raw(tmp_path / "x.safetensors", header, data)
    try:
        tensors = read_header(path)
    except UsageError:
        return
    size = sum(torch.empty(info.shape, dtype=info.dtype, device="meta").nbytes for info in tensors.values())
    assert size == len(data)


# --- names and shapes against the model ------------------------------------------------------------------------------


def test_check_against_names_what_differs() -> None:
    checkpoint = RandomCheckpoint({"layer.weight": (2, 3), "extra": (1,), "norm": (4,)}, torch.float32, 0)
    with pytest.raises(UsageError) as caught:
        check_against(checkpoint, {"layer.weights": (2, 3), "norm": (5,), "head": (1, 1)}, optional={"head"})
    assert "layer.weights is missing (the nearest is layer.weight)" in caught.value.why
    assert "extra is not part of the model" in caught.value.why
    assert "norm is [4], the config says [5]" in caught.value.why
    assert "head" not in caught.value.why


def test_check_against_refuses_integers_in_the_place_of_weights() -> None:
    checkpoint = RandomCheckpoint({"a": (2, 3), "b": (2, 3)}, torch.float32, 0)
    checkpoint.tensors["b"] = TensorInfo((2, 3), torch.int8)
    with pytest.raises(UsageError, match="1 of 2 tensors differ") as caught:
        check_against(checkpoint, {"a": (2, 3), "b": (2, 3)})
    assert "b holds torch.int8" in caught.value.why


def test_check_against_accepts_what_fits() -> None:
    checkpoint = RandomCheckpoint({"a": (2, 3), "old": (1,)}, torch.float32, 0)
    check_against(checkpoint, {"a": (2, 3), "tied": (9,)}, optional={"tied"}, ignore={"old"})


def test_check_against_stays_short() -> None:
    with pytest.raises(UsageError) as caught:
        check_against(RandomCheckpoint({}, torch.float32, 0), {f"w{i}": (1,) for i in range(5000)})
    assert "5000 of 5000" in caught.value.what
    assert len(caught.value.why) < 1000


# --- random weights --------------------------------------------------------------------------------------------------

SHAPES = {"w": (700, 1001), "w2": (700, 1001), "norm.weight": (5000,), "q.bias": (5000,), "one": (), "none": (0, 4)}


def test_random_weights_have_the_distribution_they_promise() -> None:
    checkpoint = RandomCheckpoint(SHAPES, torch.float32, 1)
    w = checkpoint.load("w")
    assert w.shape == (700, 1001)
    assert abs(w.mean().item()) < 1e-4
    assert w.std().item() == pytest.approx(0.02, rel=0.01)
    assert checkpoint.load("norm.weight").mean().item() == pytest.approx(1.0, abs=1e-2)
    assert abs(checkpoint.load("q.bias").mean().item()) < 1e-2
    assert checkpoint.load("one").shape == ()
    assert checkpoint.load("none").shape == (0, 4)
    # no chunk repeats another, in one tensor or between two
    assert torch.unique(w.flatten()[: 1 << 18]).numel() > 1000
    assert abs(torch.corrcoef(torch.stack([w.flatten(), checkpoint.load("w2").flatten()]))[0, 1].item()) < 0.01
    halves = w.flatten()[: 2 << 18].view(2, -1)
    assert abs(torch.corrcoef(halves)[0, 1].item()) < 0.01


def test_random_weights_follow_from_seed_and_name_alone() -> None:
    first, second = (RandomCheckpoint(SHAPES, torch.bfloat16, 7) for _ in range(2))
    second.load("norm.weight")  # the order of loading does not matter
    assert torch.equal(first.load("w"), second.load("w"))
    assert first.digest() == second.digest()
    other = RandomCheckpoint(SHAPES, torch.bfloat16, 8)
    assert not torch.equal(first.load("w"), other.load("w"))
    assert first.digest() != other.digest()
    # written down: the same on any machine
    pinned = RandomCheckpoint({"w": (3,), "m": (2, 2)}, torch.float32, 0)
    assert pinned.load("m").flatten().tolist() == PINNED


PINNED = [-0.008161477744579315, -0.01660252921283245, 0.007780987303704023, -0.01587817817926407]


# --- config.json -----------------------------------------------------------------------------------------------------


def config_folder(folder: Path, content: Any) -> Path:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "config.json").write_bytes(raw)
    return folder


def test_a_plain_config_passes_unchanged(tmp_path: Path) -> None:
    assert read_config(config_folder(tmp_path, CONFIG)) == CONFIG


def test_a_config_file_by_itself(tmp_path: Path) -> None:
    (tmp_path / "llama.json").write_text(json.dumps(CONFIG))
    assert read_config(tmp_path / "llama.json") == CONFIG


def test_traces_of_another_machine_are_dropped(tmp_path: Path) -> None:
    extra = {"_name_or_path": "/home/x", "_attn_implementation": "sdpa", "_attn_implementation_autoset": True}
    assert read_config(config_folder(tmp_path, {**CONFIG, **extra})) == CONFIG


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"auto_map": {"AutoModel": "modeling.X"}}, "auto_map"),
        ({"sub": {"auto_map": {}}}, "auto_map"),
        ({"_attn_implementation_internal": "org/kernel"}, "_attn_implementation_internal"),
        ({"_experts_implementation_internal": "x"}, "_experts_implementation_internal"),
        ({"x": [{"some_internal": 1}]}, "some_internal"),
        ({"_attn_implementation": "org/kernel:fn"}, "_attn_implementation"),
        ({"attn_implementation": {"a": "org/kernel"}}, "attn_implementation"),
        ({"model_type": "lama"}, "'llama'"),
        ({"model_type": "no-such-architecture"}, "no-such-architecture"),
        ({"model_type": "t5"}, "t5"),
        ({"model_type": "clip"}, "clip"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"vision_config": {"hidden_size": 4}}, "multimodal"),
        ({"inner": {"quantization_config": {"quant_method": "gptq"}}}, "inner.quantization_config"),
        ({"compression_config": {"format": "dense"}}, "compression_config"),
        ({"time_step_limit": [0.0, float("inf")]}, "time_step_limit"),
    ],
)
def test_configs_of_models_that_are_not_supported(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        read_config(config_folder(tmp_path, {**CONFIG, **change}))
    assert said in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 65}, "heads do not divide"),
        ({"num_key_value_heads": 3}, "key/value heads"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"hidden_size": 1 << 17}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"vocab_size": (1 << 22) + 1}, "vocab_size"),
        ({"num_hidden_layers": 1025}, "num_hidden_layers"),
        ({"n_layer": 10**9}, "n_layer"),
        ({"num_experts": -1}, "num_experts"),
        ({"sliding_window": -5}, "sliding_window"),
        ({"foo": 1 << 40}, "foo"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"model_type": None}, "model_type"),
        ({"model_type": 3}, "model_type"),
    ],
)
def test_absurd_and_contradictory_numbers(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_config(config_folder(tmp_path, {**CONFIG, **change}))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"a":1,"a":2}', b'"\xff"', b"[" * 100_000, b" " * ((1 << 20) + 1), b"9" * 5000]
)
def test_configs_that_are_no_json(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UsageError, match=r"config\.json"):
        read_config(config_folder(tmp_path, content))


def test_missing_config_and_link_out_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        read_config(tmp_path)
    (tmp_path / "m").mkdir()
    config_folder(tmp_path, CONFIG)
    (tmp_path / "m/config.json").symlink_to("../config.json")
    with pytest.raises(UsageError, match="leaves the model folder"):
        read_config(tmp_path / "m")


def test_a_model_far_beyond_the_machine(tmp_path: Path) -> None:
    huge = {"hidden_size": 1 << 16, "num_hidden_layers": 1024, "vocab_size": 1 << 22}
    with pytest.raises(ResourceError):
        read_config(config_folder(tmp_path, {**CONFIG, **huge}))


def test_no_transformers_code_of_the_folder_is_run(tmp_path: Path) -> None:
    config_folder(tmp_path, CONFIG)
    (tmp_path / "configuration_llama.py").write_text("raise SystemExit('ran')")
    assert read_config(tmp_path) == CONFIG


@FOLDER
@given(st.dictionaries(st.sampled_from([*CONFIG, "head_dim", "n_embd", "auto_map", "num_x", "x"]), st.recursive(
    NUMBERS | st.text(max_size=8), lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=4), s)
)))  # fmt: skip
def test_random_configs_raise_nothing_else(tmp_path: Path, change: dict[str, Any]) -> None:
    try:
        read_config(config_folder(tmp_path, {**CONFIG, **change}))
    except IngotError as error:
        assert error.what


def test_check_length() -> None:
    check_length(CONFIG, 128)
    check_length({}, 1 << 20)
    with pytest.raises(UsageError, match="129"):
        check_length(CONFIG, 129)


def test_check_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_check, "_memory", lambda field: 1000)
    check_memory(1000, "the model")
    with pytest.raises(ResourceError, match="the model"):
        check_memory(1001, "the model")


# --- tokenizer -------------------------------------------------------------------------------------------------------


def good_tokenizer() -> dict[str, Any]:
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 999}, "unk_token": "[UNK]"},
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(model={"type": "Nothing"}),
        lambda t: t.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(["}, "behavior": "Isolated", "invert": False}),  # noqa: E501
        lambda t: t.clear(),
    ],
)  # fmt: skip
def test_broken_tokenizers(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tokenizer = good_tokenizer()
    change(tokenizer)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        check_tokenizer(tmp_path, 100)


def test_a_tokenizer_may_know_more_ids_than_the_model(tmp_path: Path) -> None:
    assert check_tokenizer(tmp_path, 100) is None
    (tmp_path / "tokenizer.json").write_text(json.dumps(good_tokenizer()))
    assert check_tokenizer(tmp_path, 100) == tmp_path.resolve() / "tokenizer.json"
    (tmp_path / "out").mkdir()
    assert write_assets(CONFIG, tmp_path, tmp_path / "out", 100)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


# --- the model's source ----------------------------------------------------------------------------------------------


def test_hub_errors_say_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def offline(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    (tmp_path / "r.toml").write_text('name = "r"\n')
    recipe = load_recipe(tmp_path / "r.toml", model="org/name@" + "a" * 40)
    with pytest.raises(ResourceError) as caught:
        model_source.resolve_source(recipe)
    assert "--model DIR" in caught.value.fix
    assert (asked["name"], asked["revision"]) == ("org/name", "a" * 40)
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in asked["allow_patterns"])


def test_output_may_not_be_the_input(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "recipes").mkdir()
    path = tmp_path / "recipes/r.toml"
    path.write_text('name = "r"\n')
    recipe = load_recipe(path, model=str(model))
    for output in (model, model / "out", tmp_path, path.parent, Path("a\0b")):
        with pytest.raises(UsageError, match="--output"):
            model_source.check_output(recipe, output)
    model_source.check_output(recipe, tmp_path / "out")
    model_source.check_output(recipe, path.parent / "out")
