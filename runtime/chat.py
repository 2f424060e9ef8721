"""Chat templates: HF's conventions, rendered in a process of their own that cannot take much time or memory.

A template comes with a checkpoint and is a program. Jinja2's sandbox keeps it from Python's internals but not from
`9**9**9`, nested loops, `'a'.ljust(10**9)`, `"%1000000000d" | format(1)`, doubling a string with `~` and `replace`, or
constant folding while it compiles: guards inside the process are a list of known holes, and a call into C that runs
for minutes cannot be interrupted from Python. So a worker process renders, with kernel limits on its processor time
and address space: these hold for everything. It is started once per template, at its first use. Measured on two busy
cores: 80 to 110 ms to start (jinja2's import, 20 to 40 ms, is then not paid here) and 0.12 ms a render of five
messages, where jinja2 alone takes 0.02: a thousandth of a short answer's time.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..artifacts.errors import ResourceError, UsageError

_SECONDS = 2.0
_MAX_MEMORY_BYTES = 512 << 20
_MAX_OUTPUT_CHARS = 8 << 20
_MAX_INPUT_CHARS = 16 << 20


class ChatTemplate:
    """One chat template and its worker process.

    Args:
        source: the Jinja2 text. tokens: what the template may write by name, such as bos_token and eos_token.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self._source = source
        self._tokens = dict(tokens)
        self._worker: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt's text.

        Raises:
            UsageError: messages of another form, or the template refuses them, fails, or takes too much.
            ResourceError: the worker cannot be started.
        """
        variables = {
            "messages": [_message(message, i) for i, message in enumerate(messages)],
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
            "documents": None,
            **self._tokens,
        }
        try:
            line = json.dumps({"template": self._source, "variables": variables}, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(
                "The messages are not plain data.", str(error), "Use strings, numbers, lists, dicts."
            ) from error
        if len(line) > _MAX_INPUT_CHARS:
            why = f"With their template they take {len(line)} characters; at most {_MAX_INPUT_CHARS} are allowed."
            raise UsageError("The messages are too long.", why, "Send a shorter conversation.")
        with self._lock:
            reply = self._ask(line)
        if "error" in reply:
            raise UsageError(
                "The chat template cannot render these messages.",
                str(reply["error"]),
                "Check roles and their order against the template (chat_template.jinja in the artifact).",
            )
        return str(reply["text"])

    def close(self) -> None:
        """End the worker. Calling it twice is harmless; a later render starts a new one."""
        with self._lock:
            self._stop()

    def _ask(self, line: str) -> dict[str, Any]:
        if self._worker is None or self._worker.poll() is not None:
            self._stop()
            self._worker = _start()
        worker = self._worker
        reply = ""
        try:
            if worker.stdin is not None and worker.stdout is not None:
                worker.stdin.write(line + "\n")
                worker.stdin.flush()
                reply = worker.stdout.readline()
        except BrokenPipeError:
            pass  # it died while being written to: the same as no reply
        except BaseException:
            self._stop()  # interrupted: its reply to this request must not answer the next one
            raise
        if reply:
            return dict(json.loads(reply))
        code = worker.wait()
        self._stop()
        if code == -signal.SIGPROF:
            return {"error": f"It takes more than {_SECONDS:g} seconds of processor time."}
        if code == 1:
            raise ResourceError(
                "The chat template's worker process does not run.", "Is jinja2 installed?", "pip install ingot"
            )
        return {
            "error": f"It ended its process ({code}), probably for more than {_MAX_MEMORY_BYTES >> 20} MiB of memory."
        }

    def _stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.wait()
            for stream in (worker.stdin, worker.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):  # what was still to be written has no reader any more
                        stream.close()


def _start() -> subprocess.Popen[str]:
    command = [sys.executable, "-S", "-P", str(Path(__file__).with_name("chat_worker.py"))]
    limits = [str(_SECONDS), str(_MAX_MEMORY_BYTES), str(_MAX_OUTPUT_CHARS)]
    # The same modules as here, found without `site`; nothing else of the environment is the template's business.
    env = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONUTF8": "1", "TZ": os.environ.get("TZ", "")}
    if not env["TZ"]:
        del env["TZ"]
    try:
        # Its own group: Ctrl-C is for this process, which then ends the worker.
        return subprocess.Popen(
            [*command, *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=env,
            process_group=0,
        )
    except OSError as error:
        raise ResourceError(
            "The chat template's worker process cannot be started.", str(error), "Free some memory."
        ) from error


def _message(message: Any, index: int) -> dict[str, Any]:
    """One message with its content as text: lists of text parts are joined by line breaks, as vLLM does."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UsageError(
            f"Message {index} has no role.",
            'Each message is a dict such as {"role": "user", "content": "Hello"}.',
            "Give every message a role and a content.",
        )
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        if not all(
            isinstance(p, Mapping) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content
        ):
            raise UsageError(
                f"Message {index} holds parts that are not text.",
                "The artifact is a language model without images or sound.",
                'Send parts of the form {"type": "text", "text": "..."}.',
            )
        return {**message, "content": "\n".join(part["text"] for part in content)}
    if not isinstance(content, str | None):
        raise UsageError(
            f"The content of message {index} is {type(content).__name__}.", "It must be text.", "Send a string."
        )
    return dict(message)
