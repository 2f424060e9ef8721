"""Token-exactness of model families: tiny random models through the whole pipeline against transformers' generate.

`ingot families` prints the table. The families and their configs are data (recipes/families.toml); no code here or
anywhere else knows one of them.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..artifacts.errors import IngotError, UnsupportedModelError, UsageError
from ..artifacts.manifest import Manifest
from ..artifacts.store import OpenArtifact
from ..runtime import LLM
from ..runtime.complete import greedy_tokens
from .builder import build
from .console import Progress, SilentProgress
from .eager_engines import EagerGroup
from .facts import BuildFacts
from .gate import run_child
from .load_model import make_config
from .model_source import resolve_source
from .plan import make_plan
from .recipe import Recipe
from .recipe_sections import Gate, ModelSource, Shapes, Target
from .record import planned_manifest
from .workshop import Workshop

SUBJECTS = Path(__file__).resolve().parent.parent / "recipes" / "families.toml"
CHUNK = 16
MAX_LENGTH = 128
NEW_TOKENS = 24
# Around the chunk (16) and the sliding window (8) from both sides, and over several chunks.
PROMPT_LENGTHS = (1, 7, 8, 9, 15, 16, 17, 33, 45)


@dataclass(frozen=True)
class Subject:
    """A family to try."""

    name: str
    config: dict[str, Any]
    refused: bool


def subjects(names: Sequence[str] = ()) -> list[Subject]:
    """The families in the data file, or those named.

    Raises:
        UsageError: an unknown name.
    """
    data = tomllib.loads(SUBJECTS.read_text("utf-8"))
    common = data.pop("common")
    if unknown := [n for n in names if n not in data]:
        raise UsageError(f"no family {unknown[0]!r}", "", f"known ones: {', '.join(data)}")
    found = []
    for name, fields in data.items():
        if names and name not in names:
            continue
        own = {k: v for k, v in fields.items() if k not in ("common", "refused")}
        base = common if fields.get("common", True) else {}
        found.append(Subject(name, {"model_type": name, **base, **own}, bool(fields.get("refused"))))
    return found


def save_random_model(config: dict[str, Any], folder: Path, seed: int = 0) -> torch.nn.Module:
    """A transformers model with lively random weights, saved as a checkpoint; returns the model."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(config), attn_implementation="eager", dtype=torch.float32)
    model = model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        # Initial weights are so small that every position predicts the same token.
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(folder)
    return model


def recipe_for(
    folder: Path, name: str, source: Literal["local", "random"] = "local", device: Literal["cpu", "cuda"] = "cpu"
) -> Recipe:
    """Few engines in float32: a batch of four, and a chunk of 16 tokens."""
    return Recipe(
        name=name,
        model=ModelSource(source=source, config="config.json", dtype="float32", max_length=MAX_LENGTH),
        shapes=Shapes(
            decode_batch_sizes=(4,), prefill_lengths=(CHUNK,), kv_block_size=8, kv_cache_tokens=4 * MAX_LENGTH
        ),
        gate=Gate(prompts=("",) * 3, max_tokens=16),
        target=Target(device=device, autotune=False),
        file=folder / "recipe.toml",
        model_folder=folder if source == "local" else None,
    )


Tokens = list[list[int]]


def compiled(recipe: Recipe, root: Path, prompts: Tokens) -> tuple[Tokens, Tokens]:
    """Tokens of the recipe built into an artifact, from a lean process: each prompt alone, and all in one batch."""
    build(recipe, root, progress=SilentProgress())
    request, result = root.parent / "request.json", root.parent / "result.json"
    request.write_text(json.dumps({"artifact": str(root), "prompts": prompts, "tokens": NEW_TOKENS}))
    run_child("ingot.runtime.complete", str(request), str(result))
    alone, batched = json.loads(result.read_text())
    return alone, batched


@contextlib.contextmanager
def eager(recipe: Recipe, root: Path) -> Iterator[LLM]:
    """The recipe's planned graphs without compiling them."""
    shop = Workshop(recipe, resolve_source(recipe))
    plan = shop.plan()
    facts = BuildFacts(recipe, plan.folder, {name: shop.facts(name) for name in plan.graphs})
    manifest: Manifest = planned_manifest(facts, shop.weights.digest(), root)
    with LLM(OpenArtifact(root, manifest), engine_group=EagerGroup(plan.graphs, shop.weights.load)) as llm:
        yield llm


def uncompiled(recipe: Recipe, root: Path, prompts: Tokens) -> tuple[Tokens, Tokens]:
    """As `compiled`, of the planned graphs run eagerly in this process."""
    root.mkdir()
    with eager(recipe, root) as llm:
        return greedy_tokens(llm, prompts, NEW_TOKENS)


def expected(model: torch.nn.Module, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Greedy tokens of transformers' own generate, one prompt at a time."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        out = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS, eos_token_id=-1, pad_token_id=0,
        )  # fmt: skip
        found.append(out[0, len(prompt) :].tolist())
    return found


def try_family(
    subject: Subject, compile_engines: bool = True, device: Literal["cpu", "cuda"] = "cpu"
) -> dict[str, Any]:
    """One row of the table.

    Returns:
        family, result ("exact", "differs", "refused"), and counts of tokens that agree with transformers, alone and in
        one batch of different lengths.
    """
    row: dict[str, Any] = {"family": subject.name, "prompts": 0, "tokens": 0, "alone": 0, "batched": 0}
    name = subject.name.replace("_", "-")
    with tempfile.TemporaryDirectory(prefix=f"ingot-{name}-") as scratch:
        folder, root = Path(scratch) / "model", Path(scratch) / "artifact"
        if subject.refused:
            return {**row, **_refusal(subject, folder, name)}
        model = save_random_model(subject.config, folder)
        rng = np.random.default_rng(5)
        prompts = [rng.integers(3, subject.config["vocab_size"], n).tolist() for n in PROMPT_LENGTHS]
        recipe = recipe_for(folder, name, device=device)
        alone, batched = (compiled if compile_engines else uncompiled)(recipe, root, prompts)
        want = expected(model, prompts)
    row |= {"prompts": len(prompts), "tokens": sum(map(len, want))}
    row |= {"alone": _agreeing(want, alone), "batched": _agreeing(want, batched)}
    exact = row["alone"] == row["batched"] == row["tokens"]
    return {**row, "exact": "yes" if exact else "no", "note": ""}


def _refusal(subject: Subject, folder: Path, name: str) -> dict[str, str]:
    """A family that must be refused, before any weight is read: there are none to read."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(subject.config))
    try:
        make_plan(recipe_for(folder, name, "random"), SilentProgress())
    except UnsupportedModelError as error:
        return {"exact": "yes", "note": f"refused: {error.what} ({error.why})"}
    return {"exact": "no", "note": "should have been refused"}


def _agreeing(want: Sequence[Sequence[int]], have: Sequence[Sequence[int]]) -> int:
    """Tokens that agree up to each sequence's first difference."""
    count = 0
    for a, b in zip(want, have, strict=True):
        same = [x == y for x, y in zip(a, b)]
        count += same.index(False) if False in same else len(same)
    return count


def run(
    names: Sequence[str] = (),
    *,
    progress: Progress,
    compile_engines: bool = True,
    device: Literal["cpu", "cuda"] = "cpu",
) -> list[dict[str, Any]]:
    """The table for all families, or those named."""
    rows = []
    chosen = subjects(names)
    with progress.stage("families", total=len(chosen)):
        for subject in chosen:
            progress.update(subject.name, advance=1)
            try:
                rows.append(try_family(subject, compile_engines, device))
            except IngotError as error:
                rows.append(
                    {
                        "family": subject.name,
                        "prompts": 0,
                        "tokens": 0,
                        "alone": 0,
                        "batched": 0,
                        "exact": "no",
                        "note": str(error),
                    }
                )
    return rows
