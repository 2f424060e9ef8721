"""One test of a model on a GPU, and how it is called in the results."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Workload:
    """Decoding `tokens` tokens in each of `batch` rows behind prompts of `context` tokens, or a prompt of `tokens`.

    Args:
        phase: "decode" or "prefill".
        peers: whether the peers are measured on it too.
    """

    phase: str
    tokens: int
    context: int = 0
    batch: int = 1
    peers: bool = True

    @property
    def name(self) -> str:
        """llama-bench's words: "pp512", "tg128 @ d1024", and with more than one row "tg128 @ d1024 b8"."""
        if self.phase == "prefill":
            return f"pp{self.tokens}"
        return f"tg{self.tokens} @ d{self.context}" + (f" b{self.batch}" if self.batch > 1 else "")

    @property
    def length(self) -> int:
        """Tokens of a row at the end: what an artifact's max_length must hold, the first token among them."""
        return self.context + self.tokens + 1

    def quick(self) -> Workload:
        """The same with fewer tokens, to see that everything works."""
        if self.phase == "prefill":
            return self
        return replace(self, tokens=min(self.tokens, 32))


def decode(context: int, batch: int = 1, tokens: int = 128, peers: bool = True) -> Workload:
    """A decoding workload."""
    return Workload("decode", tokens, context, batch, peers)


def prefill(tokens: int) -> Workload:
    """A prompt."""
    return Workload("prefill", tokens)
