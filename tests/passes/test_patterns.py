"""The matcher: what it finds, what it must not find, and that it backtracks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ingot.passes.patterns import Cast, is_cast, match, number, op, tensor, var
from torch import fx

from .graphs import BF16, F32, Builder, aten

ADD, MUL, NEG, SUB = aten.add.Tensor, aten.mul.Tensor, aten.neg.default, aten.sub.Tensor


@pytest.fixture
def b() -> Builder:
    return Builder()


def test_variables_take_anything_and_keep_it(b: Builder) -> None:
    x, y = b.input("x", 4), b.input("y", 4)
    assert match(var("a"), x) == {"a": x}
    assert match(var("a"), 3) == {"a": 3}
    assert match(op(SUB, var("a"), var("b")), b.call(SUB, x, y)) == {"a": x, "b": y}
    assert match(op(SUB, var("a"), var("b")), b.call(SUB, x, 2.0)) == {"a": x, "b": 2.0}


def test_other_ops_and_inputs_do_not_match(b: Builder) -> None:
    x, y = b.input("x", 4), b.input("y", 4)
    pattern = op(SUB, var("a"), var("b"))
    assert match(pattern, b.call(ADD, x, y)) is None
    assert match(pattern, x) is None
    assert match(pattern, 3) is None
    assert match(op((ADD, SUB), var("a"), var("b")), b.call(ADD, x, y)) == {"a": x, "b": y}


def test_a_variable_that_occurs_twice_is_one_value(b: Builder) -> None:
    x, y = b.input("x", 4), b.input("y", 4)
    square = op(MUL, var("a"), var("a"))
    assert match(square, b.call(MUL, x, x)) == {"a": x}
    assert match(square, b.call(MUL, x, y)) is None
    assert match(op(ADD, op(MUL, var("a"), var("s")), var("s")), b.call(ADD, b.call(MUL, x, 2.0), 3.0)) is None
    assert match(op(ADD, op(MUL, var("a"), var("s")), var("s")), b.call(ADD, b.call(MUL, x, 2.0), 2.0)) is not None


def test_bindings_given_beforehand_hold(b: Builder) -> None:
    x, y = b.input("x", 4), b.input("y", 4)
    pattern = op(MUL, var("a"), var("b"), commutes=True)
    assert match(pattern, b.call(MUL, x, y), {"a": y}) == {"a": y, "b": x}
    assert match(pattern, b.call(MUL, x, x), {"a": y}) is None


def test_only_commutative_patterns_swap(b: Builder) -> None:
    x, y = b.input("x", 4), b.input("y", 4)
    node = b.call(MUL, b.call(NEG, x), y)
    for first, second in ((op(NEG, var("a")), var("b")), (var("b"), op(NEG, var("a")))):
        assert match(op(MUL, first, second, commutes=True), node) == {"a": x, "b": y}
    assert match(op(MUL, var("b"), op(NEG, var("a"))), node) is None


def test_it_backtracks(b: Builder) -> None:
    """The first choice for `a` in the sum leaves nothing for the product: the other must be tried."""
    x, y = b.input("x", 4), b.input("y", 4)
    node = b.call(ADD, b.call(MUL, x, y), b.call(MUL, b.call(NEG, y), x))
    pattern = op(
        ADD, op(MUL, var("a"), var("b"), commutes=True), op(MUL, op(NEG, var("a")), var("b"), commutes=True),
        commutes=True,
    )  # fmt: skip
    assert match(pattern, node) == {"a": y, "b": x}


@given(st.lists(st.booleans(), min_size=7, max_size=7))
def test_every_order_of_a_commutative_tree_matches(flips: list[bool]) -> None:
    """((a + b) * (c + d)) + (e * f), written any way round, has one meaning and one match up to renaming."""
    b = Builder()
    leaves = [b.input(name, 4) for name in "abcdef"]
    flip = iter(flips)

    def call(target: Any, one: fx.Node, two: fx.Node) -> Any:
        return b.call(target, *((two, one) if next(flip) else (one, two)))

    sums = call(ADD, leaves[0], leaves[1]), call(ADD, leaves[2], leaves[3])
    node = call(ADD, call(MUL, *sums), call(MUL, leaves[4], leaves[5]))
    either = lambda *names: op(ADD, *map(var, names), commutes=True)  # noqa: E731
    pattern = op(
        ADD, op(MUL, either("a", "b"), either("c", "d"), commutes=True), op(MUL, var("e"), var("f"), commutes=True),
        commutes=True,
    )  # fmt: skip
    found = match(pattern, node)
    assert found is not None
    assert {found["a"], found["b"], found["c"], found["d"]} == set(leaves[:4])
    assert {found["a"], found["b"]} in ({leaves[0], leaves[1]}, {leaves[2], leaves[3]})
    assert {found["e"], found["f"]} == set(leaves[4:])


def test_casts_are_looked_through_at_any_depth(b: Builder) -> None:
    x = b.input("x", 4)
    once = b.call(aten._to_copy.default, x, dtype=BF16)
    twice = b.call(aten._to_copy.default, b.call(NEG, once), dtype=F32)
    assert match(Cast(op(NEG, Cast(var("a"), bind="inner")), bind="outer"), twice) == {
        "a": once, "inner": once, "outer": twice,
    }  # fmt: skip
    named = {"x": x}
    assert match(op(NEG, Cast(var("x"))), twice.args[0], named) == named
    chain = b.call(aten._to_copy.default, b.call(aten._to_copy.default, b.call(NEG, x), dtype=BF16), dtype=F32)
    assert match(Cast(op(NEG, var("a"))), chain) == {"a": x}
    assert match(Cast(op(NEG, var("a"))), b.call(NEG, x)) == {"a": x}
    assert match(Cast(op(NEG, var("a"))), b.call(aten.reshape.default, b.call(NEG, x), [2, 2])) is None


def test_what_is_a_cast(b: Builder) -> None:
    x = b.input("x", 4)
    assert is_cast(b.call(aten._to_copy.default, x, dtype=BF16))
    assert is_cast(b.call(aten.type_as.default, x, b.input("y", 4, dtype=BF16)))
    assert not is_cast(b.call(aten._to_copy.default, x))
    assert not is_cast(b.call(aten._to_copy.default, x, dtype=BF16, device=torch.device("meta")))
    assert not is_cast(x)
    assert not is_cast(3)


def test_a_bound_op_names_its_node(b: Builder) -> None:
    x = b.input("x", 4)
    neg = b.call(NEG, x)
    assert match(op(MUL, op(NEG, var("a"), bind="neg"), 2.0, bind="out"), out := b.call(MUL, neg, 2.0)) == {
        "a": x, "neg": neg, "out": out,
    }  # fmt: skip


def test_further_arguments_must_be_the_ops_defaults(b: Builder) -> None:
    x = b.input("x", 8)
    pattern = op(aten.slice.Tensor, var("a"), 0, 2, 6)
    assert match(pattern, b.call(aten.slice.Tensor, x, 0, 2, 6)) == {"a": x}
    assert match(pattern, b.call(aten.slice.Tensor, x, 0, 2, 6, 1)) == {"a": x}
    assert match(pattern, b.call(aten.slice.Tensor, x, 0, 2, 6, 2)) is None


def test_keyword_arguments_never_match(b: Builder) -> None:
    x = b.input("x", 4)
    assert match(op(ADD, var("a"), var("b")), b.call(ADD, x, x, alpha=2)) is None


def test_lists_match_item_by_item(b: Builder) -> None:
    x, y = b.input("x", 4), b.input("y", 4)
    node = b.call(aten.cat.default, [b.call(NEG, x), y], -1)
    assert match(op(aten.cat.default, [op(NEG, var("a")), var("b")], -1), node) == {"a": x, "b": y}
    assert match(op(aten.cat.default, [var("a")], -1), node) is None
    assert match(op(aten.cat.default, [var("a"), op(NEG, var("b"))], -1), node) is None
    assert match(op(aten.cat.default, var("all"), -1), node) == {"all": [node.args[0][0], y]}


def test_restricted_variables(b: Builder) -> None:
    x = b.input("x", 4)
    node = b.call(ADD, x, 2)
    assert match(op(ADD, number("n"), tensor("t"), commutes=True), node) == {"n": 2, "t": x}
    assert match(op(ADD, number("n"), tensor("t")), node) is None
    assert match(number("n"), True) is None
    halves = b.call(aten.split.Tensor, x, 2)
    assert match(tensor("t"), halves) is None, "several tensors are not one"


def test_literals_compare_by_value_and_booleans_are_no_numbers(b: Builder) -> None:
    x = b.input("x", 4, 4)
    assert match(op(aten.mean.dim, var("a"), [-1], True), b.call(aten.mean.dim, x, [-1], True)) == {"a": x}
    assert match(op(aten.mean.dim, var("a"), [-1], True), b.call(aten.mean.dim, x, [-1], False)) is None
    assert match(op(MUL, var("a"), 1), b.call(MUL, x, True)) is None
    assert match(op(MUL, var("a"), 1), b.call(MUL, x, 1.0)) == {"a": x}
