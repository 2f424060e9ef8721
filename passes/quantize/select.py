"""Which group of the recipe a weight belongs to: patterns over names and classes, in llm-compressor's words.

A weight may have several roles, as the matrix that is both embedding and LM head, and a merged one has several parts.
"""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ..base import QuantizationGroup
from ..graph import TracedGraph, aten, is_call, is_weight, operands, source_of

CLASSES = ("Linear", "Embedding")
# What may lie between a router's product and the choice of experts.
_SCORES = (
    aten.softmax.int, aten._softmax.default, aten.sigmoid.default, aten._to_copy.default, aten.add.Tensor,
    aten.mul.Tensor, aten.div.Tensor, aten.reshape.default, aten.view.default, aten.slice.Tensor,
)  # fmt: skip


@dataclass(frozen=True)
class Role:
    """A name a weight has in the checkpoint or by the module that reads it, and that module's class."""

    name: str
    kind: str


# For each weight that a linear layer or an embedding reads, by attribute: the roles of each of its parts.
Roles = Mapping[str, list[tuple[Role, ...]]]


def matches(pattern: str, role: Role) -> bool:
    """Whether a pattern means a weight.

    Args:
        pattern: "Linear" or "Embedding" (all of that class), a module's name or its last part or several of its
            parts, a glob over the weight's whole name, or "re:" and a regular expression.
    """
    if pattern in CLASSES:
        return pattern == role.kind
    name = role.name
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern + ".") or f".{pattern}." in f".{name}."


def group_of(roles: Sequence[Role], groups: Sequence[QuantizationGroup]) -> QuantizationGroup | None:
    """The first group with a target that means one of the roles and nothing to ignore that does; None if it stays."""
    for group in groups:
        wanted = any(matches(p, role) for p in group.targets for role in roles)
        if wanted and not any(matches(p, role) for p in group.ignore for role in roles):
            return None if group.scheme == "none" else group
    return None


def roles_of(traced: TracedGraph) -> Roles:
    """The roles of every weight that linear layers and embeddings read."""
    found: dict[str, list[Role]] = defaultdict(list)
    for node in traced.graph.nodes:
        weight, kind = read_by(node)
        if weight is not None:
            found[str(weight.target)] += [Role(f"{source_of(node)}.weight", kind)]
    roles: dict[str, list[tuple[Role, ...]]] = {}
    for attribute, modules in found.items():
        names = traced.weights.entries[attribute].sources()
        kinds = {role.kind for role in modules}
        parts = [tuple(Role(name, kind) for kind in sorted(kinds)) for name in names]
        # A module's own name counts where it is the only one: of tied weights the checkpoint holds one name alone.
        roles[attribute] = [(*parts[0], *modules)] if len(parts) == 1 else parts
    return roles


def read_by(node: fx.Node) -> tuple[fx.Node | None, str]:
    """The stored weight that a linear layer or an embedding reads, and which of the two it is."""
    for target, kind, index in ((aten.linear.default, "Linear", 1), (aten.embedding.default, "Embedding", 0)):
        if is_call(node, target) and is_weight(operands(node)[index]):
            return operands(node)[index], kind
    return None, ""


def is_router(linear: fx.Node) -> bool:
    """Whether a product's results are scores by which experts are chosen (top-k)."""
    seen, front = set(), [linear]
    while front:
        for user in front.pop().users:
            if is_call(user, aten.topk.default):
                return True
            if user not in seen and is_call(user, *_SCORES):
                seen.add(user)
                front.append(user)
    return False
