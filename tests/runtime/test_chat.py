"""Chat templates: HF's conventions, and hostile templates and messages that end quickly in one clear error."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from ingot.artifacts.errors import UsageError
from ingot.runtime.chat import ChatTemplate

from .conftest import TEMPLATE

USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def render() -> Iterator[object]:
    made: list[ChatTemplate] = []

    def once(source: str, messages: object = None, **keys: object) -> str:
        made.append(ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}))
        return made[-1].render(USER if messages is None else messages, **keys)  # type: ignore[arg-type]

    yield once
    for template in made:
        template.close()


@pytest.mark.parametrize(
    ("source", "text"),
    [
        # trim_blocks and lstrip_blocks: a block's line leaves nothing behind; the last line break is jinja2's to drop.
        ("{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n", "Hi\n"),
        ("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}", "<s>Hi</s>"),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{{ {'a': '<ü>'} | tojson }}", '{"a": "<ü>"}'),
        ("{{ {'b': 1, 'a': [2]} | tojson(indent=2) }}", '{\n  "b": 1,\n  "a": [\n    2\n  ]\n}'),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "Hi!"),
        ("{{ tools is none }}{{ missing is defined }}{{ add_generation_prompt }}", "TrueFalseTrue"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{{ '<b>' }}{{ messages[0].content.strip().upper() }}", "<b>HI"),
    ],
)
def test_conventions(render: object, source: str, text: str) -> None:
    assert render(source) == text  # type: ignore[operator]


def test_the_date_is_todays(render: object) -> None:
    assert render("{{ strftime_now('%Y') }}") in {time.strftime("%Y"), str(int(time.strftime("%Y")) + 1)}  # type: ignore[operator]


def test_text_parts_are_joined(render: object) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "one\ntwo"  # type: ignore[operator]


def test_tools_and_unicode_reach_the_template(render: object) -> None:
    tools = [{"name": "wetter😀"}]
    assert render("{{ tools[0].name }}", tools=tools) == "wetter😀"  # type: ignore[operator]


HOSTILE = {
    "power": "{{ 9**(9**9) }}",
    "power at run time": "{% set n = messages | length * 9 %}{{ n**(n**n) }}",
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "repetition": "{{ 'a' * 10**10 }}",
    "padding": "{{ 'a'.ljust(10**10) }}",
    "format": "{{ '%10000000000d' | format(1) }}",
    "list repetition": "{% set l = [0] * 10**10 %}",
    "doubling": "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "replacing": "{% set n = namespace(s='a') %}{% for i in range(60) %}"
    "{% set n.s = n.s | replace('a', 'aa') %}{% endfor %}",
    "output": "{% for a in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "lorem": "{{ lipsum(n=10**9) }}",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "mutation": "{% set x = messages.append(1) %}",
    "syntax": "{% for %}",
    "include": "{% include '/etc/passwd' %}",
    "refusal": "{{ raise_exception('roles must alternate') }}",
    "undefined": "{{ messages[7].content.strip() }}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_templates_end_quickly_in_one_error(render: object, source: str) -> None:
    start = time.perf_counter()
    with pytest.raises(UsageError, match="chat template cannot render") as caught:
        render(source)  # type: ignore[operator]
    assert time.perf_counter() - start < 15, "two seconds of processor time, on a busy machine"
    assert caught.value.why and "Traceback" not in str(caught.value)


def test_the_reason_of_a_refusal_is_told(render: object) -> None:
    with pytest.raises(UsageError, match="roles must alternate"):
        render(HOSTILE["refusal"])  # type: ignore[operator]
    with pytest.raises(UsageError, match="processor time"):
        render(HOSTILE["nested ranges"])  # type: ignore[operator]
    with pytest.raises(UsageError, match="memory"):
        render(HOSTILE["repetition"])  # type: ignore[operator]


def test_a_template_renders_again_after_its_worker_was_killed() -> None:
    power = "{% set n = messages | length * 9 %}{{ n**(n**n) }}"
    template = ChatTemplate(
        f"{{% if messages[0].content == 'bad' %}}{power}{{% endif %}}{{{{ messages[0].content }}}}", {}
    )
    assert template.render(USER) == "Hi"
    with pytest.raises(UsageError):
        template.render([{"role": "user", "content": "bad"}])
    assert template.render(USER) == "Hi"
    worker = template._worker
    template.close()
    template.close()
    assert worker is not None and worker.poll() is not None
    assert template.render(USER) == "Hi"
    template.close()


@pytest.mark.parametrize(
    "messages",
    [
        ["text"], [{}], [{"role": 1, "content": "x"}], [{"content": "x"}], [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        [{"role": "user", "content": "x", "more": object()}],
        [{"role": "user", "content": "x", "more": float("nan")}], [{"role": "user", "content": "x" * (17 << 20)}],
        [{"role": "alien", "content": "x"}],
    ],
)  # fmt: skip
def test_wrong_messages_are_refused(render: object, messages: object) -> None:
    with pytest.raises(UsageError):
        render(TEMPLATE, messages)  # type: ignore[operator]


def test_deeply_nested_messages_are_refused(render: object) -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(UsageError):
        render("x", [{"role": "user", "content": "x", "more": nested}])  # type: ignore[operator]
