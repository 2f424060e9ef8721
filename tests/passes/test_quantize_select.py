"""Patterns of weight names and classes: what they mean, and which group of several has a weight."""

from __future__ import annotations

import pytest
from ingot.passes.base import QuantizationGroup
from ingot.passes.quantize.select import Role, group_of, matches

NAME = "model.layers.1.mlp.gate_proj.weight"
ROLE = (Role(NAME, "Linear"),)
TIED = (Role("model.embed_tokens.weight", "Embedding"), Role("lm_head.weight", "Linear"))


@pytest.mark.parametrize(
    ("pattern", "hits"),
    [
        ("Linear", True),
        ("Embedding", False),
        ("lm_head", False),
        ("model.layers.1", True),
        ("model.layers.11", False),
        ("layers.1", True),
        ("mlp.gate_proj", True),
        ("gate", False),
        ("*.gate_proj.weight", True),
        ("*.gate_proj", False),
        (r"re:layers\.\d+\.mlp", True),
        (r"re:^mlp", False),
    ],
)
def test_patterns(pattern: str, hits: bool) -> None:
    assert matches(pattern, ROLE[0]) is hits
    assert (group_of(ROLE, [QuantizationGroup("W8A16", (pattern,))]) is not None) is hits
    assert (group_of(ROLE, [QuantizationGroup("W8A16", ("Linear",), (pattern,))]) is None) is hits


def test_classes_are_those_of_the_reader() -> None:
    assert matches("Embedding", Role("linear.weight", "Embedding"))
    assert not matches("Linear", Role("linear.weight", "Embedding"))


def test_the_first_group_wins_and_none_keeps() -> None:
    eight, four, keep = (
        QuantizationGroup("W8A16", ("mlp",)),
        QuantizationGroup("W4A16"),
        QuantizationGroup("none", ("mlp",)),
    )
    assert group_of(ROLE, [eight, four]) == eight
    assert group_of(ROLE, [four, eight]) == four
    assert group_of(ROLE, [keep, four]) is None
    assert group_of(ROLE, [QuantizationGroup("W8A16", ("Linear",), ("mlp",)), four]) == four
    assert group_of(ROLE, []) is None


def test_a_weight_with_two_roles_is_meant_by_either_and_ignored_by_either() -> None:
    for target in ("Linear", "Embedding", "lm_head", "embed_tokens", "re:embed"):
        assert group_of(TIED, [QuantizationGroup("W8A16", (target,))]) is not None
        assert group_of(TIED, [QuantizationGroup("W8A16", ("Linear", "Embedding"), (target,))]) is None
