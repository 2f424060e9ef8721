"""Streamed text is the whole text, no character is ever split, and stop strings are found wherever tokens are cut."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ingot.runtime.detokenizer import Detokenizer, StopMatcher
from ingot.runtime.tokenizer import Tokenizer

from .conftest import byte_level_tokenizer

texts = st.text(max_size=40) | st.text(alphabet="aé世😀👩‍ \n�", max_size=30)


@pytest.fixture(scope="module", params=["byte-level", "byte-fallback"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "byte-fallback":
        return Tokenizer(request.getfixturevalue("stories") / "tokenizer.json", 512)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    byte_level_tokenizer().save(str(path))
    return Tokenizer(path, 512)


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt or [])
    return [*(detokenizer.add(token) for token in ids), detokenizer.flush()]


@settings(max_examples=200, deadline=None)
@given(texts)
@example("Hello 😀 world")
@example("�" * 40)
@example("  two  spaces  ")
def test_pieces_are_the_whole_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False, limit=10_000)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="aé世😀 .", min_size=1, max_size=20), st.integers(0, 100))
@example("世😀世", 9)  # the prompt's last tokens begin within a character
def test_text_follows_the_prompts(tokenizer: Tokenizer, text: str, cut: int) -> None:
    ids = tokenizer.encode(text, add_special_tokens=True, limit=10_000)
    cut %= len(ids) + 1
    start = tokenizer.decode([token for token in ids[:cut] if token not in tokenizer.special_ids])
    if start.endswith("�"):
        return  # the prompt itself ends within a character
    whole = tokenizer.decode([token for token in ids if token not in tokenizer.special_ids])
    assert start + "".join(stream(tokenizer, ids[cut:], ids[:cut])) == whole


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 319), max_size=200))
def test_any_tokens_at_all_give_text_and_hold_little_back(tokenizer: Tokenizer, ids: list[int]) -> None:
    detokenizer = Detokenizer(tokenizer)
    for token in ids:
        detokenizer.add(token)
        assert len(detokenizer._window) <= 2 * 65
    detokenizer.flush()


def test_special_tokens_are_left_out_or_shown(tokenizer: Tokenizer) -> None:
    special = min(tokenizer.special_ids)
    shown = tokenizer.token(special) or ""
    ids = tokenizer.encode("Hello", add_special_tokens=False, limit=100)
    for skip in (True, False):
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
        text = "".join(map(detokenizer.add, [*ids, special, *ids])) + detokenizer.flush()
        assert (shown in text) == (not skip)
        assert text.count("Hello") == 2


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """The stop that ends first, the longest of those: character by character."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return end, max(found, key=len)
    return None


@settings(max_examples=400)
@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_stops_are_found_wherever_pieces_are_cut(pieces: list[str], stops: list[str], include: bool) -> None:
    text = "".join(pieces)
    expected = first_stop(text, stops)
    matcher = StopMatcher(stops, include)
    shown, found = "", None
    for index, piece in enumerate(pieces):
        out, found = matcher.add(piece)
        shown += out
        if found is not None:
            break
        # Nothing is held back but the beginning of a stop string, and with `include` nothing at all.
        so_far = "".join(pieces[: index + 1])
        held = so_far[len(shown) :]
        assert so_far.startswith(shown)
        assert (
            held == ""
            if include
            else held
            == max(
                (so_far[i:] for i in range(len(so_far) + 1) if any(stop.startswith(so_far[i:]) for stop in stops)),
                key=len,
                default="",
            )
        )
    if expected is None:
        assert found is None and shown + matcher.flush() == text
    else:
        end, stop = expected
        assert found == stop and shown == text[: end if include else end - len(stop)]
