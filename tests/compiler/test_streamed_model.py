"""A walk over the model part by part gives what the model gives, with one part's weights in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ingot.compiler.families import save_random_model, subjects
from ingot.compiler.load_model import make_model
from ingot.compiler.model_weights import open_weights
from ingot.compiler.streamed_model import Part, StreamedModel


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "deepseek_v3"])
def test_logits_are_the_models_own(family: str, tmp_path: Path) -> None:
    config = subjects([family])[0].config
    model = save_random_model(config, tmp_path)
    weights = open_weights(make_model(config, "float32"), tmp_path, "float32", 0)
    streamed = StreamedModel(config, "float32", weights.load)
    tokens = torch.randint(3, 120, (70, 32), generator=torch.Generator().manual_seed(0))  # more than one portion
    found: list[torch.Tensor] = []
    filled: list[set[str]] = []

    def visit(part: Part) -> Any:
        filled.append({n for n, p in streamed.model.named_parameters() if p.device.type != "meta"})
        assert filled[-1] <= {*part.names} and filled[-1]
        if part.path == "lm_head":
            return part.run(lambda start, out: found.append(out))
        return part.run()

    streamed.walk(tokens, visit, last="lm_head")
    assert torch.allclose(torch.cat(found), model(tokens).logits, atol=1e-5)
    assert len(found) == 2
    assert all(p.device.type == "meta" for p in streamed.model.parameters())
    layers = [path for path in streamed.parts if path.rpartition(".")[2].isdigit()]
    assert len(layers) == model.config.num_hidden_layers  # type: ignore[union-attr]


def test_a_part_can_run_several_times_and_change_its_weights(tmp_path: Path) -> None:
    config = subjects(["llama"])[0].config
    model = save_random_model(config, tmp_path)
    weights = open_weights(make_model(config, "float32"), tmp_path, "float32", 0)
    streamed = StreamedModel(config, "float32", weights.load)
    tokens = torch.randint(3, 120, (3, 8), generator=torch.Generator().manual_seed(0))
    found: list[torch.Tensor] = []

    def visit(part: Part) -> Any:
        before = part.run()
        if part.path == "model.layers.1":
            part.module.get_submodule("mlp.down_proj").weight.zero_()  # type: ignore[operator, union-attr]
            assert not torch.equal(part.run(), before)
        if part.path == "lm_head":
            found.append(before)
        return part.run()

    streamed.walk(tokens, visit, last="lm_head")
    model.get_submodule("model.layers.1.mlp.down_proj").weight.zero_()  # type: ignore[operator, union-attr]
    assert torch.allclose(found[0], model(tokens).logits, atol=1e-5)


def test_a_visitor_that_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    config = subjects(["llama"])[0].config
    save_random_model(config, tmp_path)
    weights = open_weights(make_model(config, "float32"), tmp_path, "float32", 0)
    streamed = StreamedModel(config, "float32", weights.load)

    def visit(part: Part) -> Any:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        streamed.walk(torch.ones(2, 4, dtype=torch.int64), visit)
    assert all("forward" not in vars(module) for module in streamed.parts.values())
    assert all(p.device.type == "meta" for p in streamed.model.parameters())
