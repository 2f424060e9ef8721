"""The process in which chat templates are rendered: a script, started by chat.py, that never imports ingot.

Lines of JSON in, lines of JSON out. Its own limits on processor time and memory are set before it reads a template.
"""

from __future__ import annotations

import datetime
import json
import resource
import signal
import sys
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class GenerationTag(Extension):
    """HF's `{% generation %}` block, which marks the assistant's tokens for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: object) -> None:
    """What templates call to refuse a conversation."""
    raise TemplateError(str(message))


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """HF's tojson: without jinja2's HTML escapes, and Unicode as it is."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja2 as HF's apply_chat_template sets it up."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    env.filters["tojson"] = to_json
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return env


def render(template: Any, variables: dict[str, Any], max_chars: int) -> dict[str, str]:
    """One reply: {"text": ...}, or {"error": ...} with the reason."""
    pieces, size = [], 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        size += len(piece)
        if size > max_chars:
            return {"error": f"it wrote more than {max_chars} characters"}
    return {"text": "".join(pieces)}


def main() -> None:
    """Serve until the input ends."""
    seconds, max_bytes, max_chars = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    env, template = environment(), None
    for line in sys.stdin:
        # No handler: when the time is over the kernel ends the process, also in the middle of 9 ** 9 ** 9.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            request = json.loads(line)
            if template is None:
                template = env.from_string(request["template"])
            reply = render(template, request["variables"], max_chars)
        except MemoryError:
            reply = {"error": f"it took more than {max_bytes >> 20} MiB of memory"}
        except RecursionError:
            reply = {"error": "it calls itself without end"}
        except Exception as error:  # noqa: BLE001  # a template can raise anything; all of it is the template's fault
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
