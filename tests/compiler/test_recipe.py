"""Recipes: what is accepted, what every wrong one is told, and that recipes/README.md says the same as the code."""

from __future__ import annotations

import json
import re
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ingot.artifacts.errors import UsageError
from ingot.compiler.config_check import check_length, read_config
from ingot.compiler.recipe import Recipe, load_recipe
from ingot.compiler.recipe_parse import keys, type_name
from ingot.compiler.recipe_sections import DEFAULT_PROMPTS
from ingot.passes.quantize.schemes import SCHEMES

RECIPES = Path(__file__).parents[2] / "recipes"
ALL = [path for path in sorted(RECIPES.glob("*.toml")) if path.name != "families.toml"]  # a list of test subjects
COMMIT = "0123456789" * 4


def write(folder: Path, text: str) -> Path:
    path = folder / "r.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str, model: str | None = None) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load_recipe(path, overrides, model).check_source()
    assert caught.value.what
    assert caught.value.fix
    return caught.value


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path, 'name = "r"\n')


def test_defaults_are_resolved(minimal: Path) -> None:
    recipe = load_recipe(minimal)
    assert recipe.shapes.kv_cache_tokens == 2048
    assert recipe.gate.prompts == DEFAULT_PROMPTS
    assert [(e.name, e.phase, e.batch, e.length) for e in recipe.engines()] == [
        ("decode-b1", "decode", 1, 1),
        ("prefill-c128", "prefill", 1, 128),
    ]


def test_shapes_are_sorted_and_cache_follows_them(minimal: Path) -> None:
    recipe = load_recipe(minimal, ["decode_batch_sizes=[4, 1]", "max_length=100", "prefill_lengths=[64,16]"])
    assert recipe.shapes.decode_batch_sizes == (1, 4)
    assert recipe.shapes.prefill_lengths == (16, 64)
    assert recipe.shapes.kv_cache_tokens == 4 * 7 * 16  # whole blocks for each sequence


def test_to_dict_is_plain_deterministic_and_has_no_absolute_path(minimal: Path, tmp_path: Path) -> None:
    model = tmp_path / "my-model"
    model.mkdir()
    data = load_recipe(minimal, model=str(model)).to_dict()
    text = json.dumps(data, allow_nan=False)
    assert json.loads(text) == data
    assert str(tmp_path) not in text
    assert data["model"]["path"] == "my-model"
    assert data == load_recipe(minimal, model=str(model)).to_dict()
    leaves = {key.path for key in keys(Recipe)}
    assert leaves == set(_paths(data))


def _paths(data: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in data.items():
        found += _paths(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return found


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_bundled_recipes_load_and_are_named_after_their_file(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    if recipe.model.config:
        random = load_recipe(path, ["source=random"])
        random.check_source()
        check_length(read_config(random.config_path()), recipe.model.max_length)


@pytest.mark.parametrize("path", [p for p in ALL if '[model]\nsource = "hub"' in p.read_text()], ids=lambda p: p.stem)
def test_hub_recipes_need_a_commit(path: Path) -> None:
    error = refusal(path)
    assert "revision" in error.what
    assert "commits/main" in error.fix
    load_recipe(path, [f"revision={COMMIT}"]).check_source()


def test_stories_recipe_says_that_it_needs_a_model(tmp_path: Path) -> None:
    error = refusal(RECIPES / "stories260k.toml")
    assert "--model" in error.fix
    recipe = load_recipe(RECIPES / "stories260k.toml", model=str(tmp_path))
    assert recipe.model_path() == tmp_path


# --- overrides and --model -------------------------------------------------------------------------------------------


def test_overrides_take_toml_values_bare_strings_and_short_names(minimal: Path) -> None:
    recipe = load_recipe(minimal, ["model.max_length = 64", "prefill_lengths=[8]", "source=hub", 'id="a/b"', "top1=1"])
    assert (recipe.model.max_length, recipe.shapes.prefill_lengths) == (64, (8,))
    assert (recipe.model.source, recipe.model.id, recipe.gate.budgets.top1) == ("hub", "a/b", 1.0)


def test_a_commit_of_digits_stays_text(minimal: Path) -> None:
    assert load_recipe(minimal, [f"revision={COMMIT}"]).model.revision == COMMIT


def test_later_overrides_win(minimal: Path) -> None:
    assert load_recipe(minimal, ["max_length=200", "max_length=300"]).model.max_length == 300


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.max_lenght=3", "model.max_length"),
        ("sauce=random", "model.source"),
        ("seed=1", "model.seed or gate.seed"),
        ("max_length", "key=value"),
        ("max_length=x", "integer"),
        ("=3", "unknown key"),
        ("shapes.decode_batch_sizes=[1,", "list of integers"),
        ("max_length=1\nname=2", "integer"),
    ],
)
def test_wrong_overrides(minimal: Path, override: str, said: str) -> None:
    assert said in str(refusal(minimal, override))


def test_an_override_below_a_key_that_is_no_table(tmp_path: Path) -> None:
    assert "model" in str(refusal(write(tmp_path, 'name = "r"\nmodel = 3\n'), "model.seed=1"))


def test_model_folder_replaces_a_hub_source(tmp_path: Path) -> None:
    path = write(tmp_path, f'name = "r"\n[model]\nsource = "hub"\nid = "a/b"\nrevision = "{COMMIT}"\n')
    recipe = load_recipe(path, model=str(tmp_path))
    assert (recipe.model.source, recipe.model.id, recipe.model.revision) == ("local", "", "")
    assert recipe.model_path() == tmp_path.resolve()


def test_model_hub_id_with_commit(minimal: Path) -> None:
    recipe = load_recipe(minimal, model=f"org/name@{COMMIT}")
    assert (recipe.model.source, recipe.model.id, recipe.model.revision) == ("hub", "org/name", COMMIT)
    recipe.check_source()


def test_set_takes_the_source_back_from_model(minimal: Path, tmp_path: Path) -> None:
    recipe = load_recipe(minimal, ["source=random"], model=str(tmp_path))
    assert recipe.model_folder is None


@pytest.mark.parametrize("model", ["a/b/c", "", "../nothing", "x\0y", "/nope", "a" * 5000, "org/name@main"])
def test_wrong_models(minimal: Path, model: str) -> None:
    refusal(minimal, model=model)


def test_a_file_is_no_model(minimal: Path) -> None:
    refusal(minimal, model=str(minimal))


# --- threats: Recipe -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ("[modle]\n", "did you mean model"),
        ("[model]\nmax_lenght = 3\n", "did you mean model.max_length"),
        ("[shapes]\nbatch_sizes = [1]\n", "did you mean shapes.decode_batch_sizes"),
        ("model = 3\n", "model must be a table"),
        ("[model]\nmax_length = true\n", "model.max_length"),
        ("[model]\nmax_length = 12.0\n", "model.max_length"),
        ("[model]\nmax_length = '12'\n", "model.max_length"),
        ("[model]\nmax_length = 0\n", "model.max_length"),
        ("[model]\nmax_length = -1\n", "model.max_length"),
        ("[model]\nmax_length = 1048577\n", "model.max_length"),
        ("[model]\nmax_length = 0x" + "f" * 9000 + "\n", "model.max_length"),
        ("[model]\nmax_length = " + "9" * 9000 + "\n", "TOML"),
        ("[model]\ndtype = 'bfloat'\n", 'did you mean "bfloat16"'),
        ("[model]\nid = 'a b'\n", "model.id"),
        ("[model]\nid = '../../etc'\n", "model.id"),
        ("[model]\nrevision = 'main'\n", "model.revision"),
        ("[model]\nseed = -1\n", "model.seed"),
        ("[shapes]\ndecode_batch_sizes = 4\n", "shapes.decode_batch_sizes"),
        ("[shapes]\ndecode_batch_sizes = []\n", "shapes.decode_batch_sizes"),
        ("[shapes]\ndecode_batch_sizes = [0]\n", "shapes.decode_batch_sizes[0]"),
        ("[shapes]\ndecode_batch_sizes = [1, -4]\n", "shapes.decode_batch_sizes[1]"),
        ("[shapes]\ndecode_batch_sizes = [1025]\n", "shapes.decode_batch_sizes[0]"),
        ("[shapes]\ndecode_batch_sizes = [1, 1]\n", "shapes.decode_batch_sizes"),
        (f"[shapes]\nprefill_lengths = {list(range(1, 18))}\n", "shapes.prefill_lengths"),
        ("[shapes]\nprefill_lengths = [4096]\n", "shapes.prefill_lengths"),
        ("[shapes]\nprefill_lengths = [[1]]\n", "shapes.prefill_lengths[0]"),
        ("[shapes]\nkv_block_size = 24\n", "shapes.kv_block_size"),
        ("[shapes]\nkv_block_size = 512\n", "shapes.kv_block_size"),
        ("[shapes]\nkv_cache_tokens = 100\n", "shapes.kv_cache_tokens"),
        ("[shapes]\nkv_cache_tokens = 1000000000\n", "shapes.kv_cache_tokens"),
        ("[shapes]\ndecode_batch_sizes = [1024]\n[model]\nmax_length = 1000000\n", "shapes.kv_cache_tokens"),
        ("[quantization]\nscheme = 'w8a16'\n", 'did you mean "W8A16"'),
        ("[quantization]\nscheme = 'w4a16'\n", 'did you mean "W4A16"'),
        ("[quantization]\nscheme = 'int4'\n", "quantization.scheme"),
        ("[quantization]\nignore = ['re:(']\n", "quantization.ignore"),
        ("[quantization]\nscheme = 'W4A16'\ngroup_size = 48\n", "quantization.group_size"),
        ("[quantization]\nscheme = 'W4A16'\ngroup_size = 256\n", "quantization.group_size"),
        ("[quantization]\nscheme = 'W8A16'\nsymmetric = false\n", "quantization.symmetric"),
        ("[quantization]\nscheme = 'W8A16'\n[[quantization.groups]]\nscheme = 'W4A16'\n", "quantization is refused"),
        ("[quantization]\ngroups = 1\n", "list of tables"),
        ("[quantization]\ngroups = ['W4A16']\n", "quantization.groups[0] must be a table"),
        ("[[quantization.groups]]\nscheme = 'W4'\n", 'did you mean "W4A16"'),
        ("[[quantization.groups]]\nscheme = 'W4A16'\ntarget = ['x']\n", "did you mean quantization.groups[0].targets"),
        ("[[quantization.groups]]\n[[quantization.groups]]\ntargets = ['re:[']\n", "quantization.groups[1].targets"),
        ("[[quantization.groups]]\n[[quantization.groups.groups]]\n", "unknown key"),
        ("[gate]\nprompts = []\n", "gate.prompts"),
        ("[gate]\nprompts = ['a', '']\n", "gate.prompts"),
        ("[gate]\nprompts = ['a', 3]\n", "gate.prompts[1]"),
        ("[gate]\nprompts = ['a']\nprompts_file = 'p.txt'\n", "gate.prompts_file"),
        ("[gate]\nprompts_file = 'missing.txt'\n", "gate.prompts_file"),
        ("[gate]\ntask = '../task.jsonl'\n", "gate.task"),
        ("[gate.budgets]\nmean_kl = nan\n", "gate.budgets.mean_kl"),
        ("[gate.budgets]\ntop1 = 1.5\n", "gate.budgets.top1"),
        ("[gate.budgets]\nmean_kl = -inf\n", "gate.budgets.mean_kl"),
        ("[target]\ndevice = 'tpu'\n", "target.device"),
    ],
)
def test_wrong_values_name_file_and_key(tmp_path: Path, body: str, key: str) -> None:
    name = 'name = "r"\n'
    error = refusal(write(tmp_path, name + body))
    assert key in str(error)
    assert "r.toml" in error.what


def test_a_billion_buckets(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, f'name = "r"\n[shapes]\nprefill_lengths = [{"1," * 400_000}]\n'))
    assert "prefill_lengths" in error.what


@pytest.mark.parametrize("key", ["model.path", "model.config", "gate.task", "gate.prompts_file"])
@pytest.mark.parametrize("value", ["../outside", "/etc", "a/../../b", "link/x", "a\\u0000b", "x" * 5000])
def test_paths_may_not_leave_the_folder(tmp_path: Path, key: str, value: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path)
    section, _, leaf = key.partition(".")
    kind = "random" if leaf == "config" else "local"
    source = f'source = "{kind}"\n' if section == "model" else ""
    error = refusal(write(tmp_path / "in", f'name = "r"\n[{section}]\n{source}{leaf} = "{value}"\n'))
    assert key in error.what


def test_missing_name(tmp_path: Path) -> None:
    assert "name" in refusal(write(tmp_path, "[model]\nseed = 1\n")).what


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 101, "a b"])
def test_wrong_names(tmp_path: Path, name: str) -> None:
    assert "name" in refusal(write(tmp_path, f'name = "{name}"\n')).what


def test_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    for content, said in [
        (b"", "empty"),
        (b"# nothing\n", "empty"),
        (b'name = "\xff"\n', "UTF-8"),
        (b"name = \n", "TOML"),
        (b"a = " + b"[" * 100_000, "TOML"),
        (b'name = "r"\nname = "s"\n', "TOML"),
        (b"#" * (1 << 20) + b"\n", "too large"),
        (b"\x00" * 100, "TOML"),
    ]:
        path.write_bytes(content)
        assert said in refusal(path).what
    for missing in (tmp_path, tmp_path / "none.toml", Path("a\0b"), Path("x" * 5000), Path("/dev/null")):
        refusal(missing)


def test_prompts_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    recipe = load_recipe(write(tmp_path, 'name = "r"\n[gate]\nprompts_file = "p.txt"\n'))
    assert recipe.gate.prompts == ("one", "two")


def test_no_absolute_prompt_file_of_a_gigabyte(tmp_path: Path) -> None:
    with (tmp_path / "p.txt").open("wb") as file:
        file.truncate(1 << 30)
    assert "too large" in refusal(write(tmp_path, 'name = "r"\n[gate]\nprompts_file = "p.txt"\n')).what


FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)


def survives(path: Path, *overrides: str) -> None:
    try:
        recipe = load_recipe(path, overrides)
        recipe.check_source()
        json.dumps(recipe.to_dict(), allow_nan=False)
    except UsageError as error:
        str(error)


@FOLDER
@given(st.binary(max_size=300))
@example(b"\xef\xbb\xbfname = 'r'")
def test_random_bytes_raise_nothing_else(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(content)
    survives(path)


VALUES = st.recursive(
    st.one_of(st.integers(), st.floats(), st.booleans(), st.text(max_size=20), st.integers(1, 64), st.just(10**4000)),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=6,
)


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return json.dumps(value) if isinstance(value, str) else repr(value)


@FOLDER
@given(st.dictionaries(st.sampled_from([key.path for key in keys(Recipe)] + ["model", "gate", "x"]), VALUES))
def test_random_toml_raises_nothing_else(tmp_path: Path, data: dict[str, Any]) -> None:
    lines = ['"name" = "r"'] + [f"{key} = {toml(value)}" for key, value in data.items() if key != "name"]
    survives(write(tmp_path, "\n".join(lines)))


@FOLDER
@given(st.lists(st.tuples(st.sampled_from([*(key.path for key in keys(Recipe)), "seed", "x.y", ""]), st.text())))
def test_random_overrides_raise_nothing_else(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    survives(write(tmp_path, 'name = "r"\n'), *(f"{key}={value}" for key, value in pairs))


def test_groups_keep_their_order_and_none_keeps_a_weight(tmp_path: Path) -> None:
    body = """
name = "r"
[[quantization.groups]]
scheme = "W8A16"
targets = ["lm_head"]
[[quantization.groups]]
targets = ["re:down"]
[[quantization.groups]]
scheme = "W4A16"
symmetric = false
"""
    asked = load_recipe(write(tmp_path, body)).quantization
    assert [g.scheme for g in asked.active] == ["W8A16", "none", "W4A16"]
    assert asked.schemes == ("W8A16", "W4A16")
    assert asked.active[2].group_size == 128 and not asked.active[2].symmetric
    one = load_recipe(write(tmp_path, 'name = "r"\n'), ["scheme=W8A8"]).quantization
    assert one.active == (one,) and one.schemes == ("W8A8",)
    assert load_recipe(write(tmp_path, 'name = "r"\n[[quantization.groups]]\n')).quantization.active == ()


def test_the_recipe_knows_every_scheme() -> None:
    kind = next(key.type for key in keys(Recipe) if key.path == "quantization.scheme")
    assert set(typing.get_args(kind)) == {"none", *SCHEMES}


# --- the documentation -----------------------------------------------------------------------------------------------


def test_readme_documents_each_key_once_with_type_and_default() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \| ?(.*?) ?\| (.+) \|$", (RECIPES / "README.md").read_text(), re.M)
    documented = {key: (kind, default) for key, kind, default, _ in rows}
    assert len(documented) == len(rows), "a key is documented twice"
    expected = {}
    for key in keys(Recipe):
        if key.path == "gate.prompts":
            default = "(four short English prompts)"
        elif key.default is None or key.path == "name":
            default = ""
        else:
            default = json.dumps(list(key.default) if isinstance(key.default, tuple) else key.default)
        expected[key.path] = (type_name(key.type), default)
    assert documented == expected


def test_readme_lists_every_recipe() -> None:
    text = (RECIPES / "README.md").read_text()
    assert [p.name for p in RECIPES.glob("*.toml") if p.name not in text] == []
