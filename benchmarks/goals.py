"""What follows from the measured series: ratios to the peers, and which goals are reached."""

from __future__ import annotations

import re
from dataclasses import replace

from .results import OURS, Goal, Limits, Model, Series, pairwise


def in_cache(series: Series, limits: Limits) -> bool:
    """Whether what a step reads stays in the cache from step to step, so that memory bandwidth says nothing."""
    return 0 < series.read_bytes <= limits.cache_bytes


def share(series: Series, limits: Limits) -> float:
    """A series' share of its ceiling, read bandwidth or matmul rate; 0 when that is not known."""
    if series.flops:
        return series.tflop_s / limits.matmul_tflop_s if limits.matmul_tflop_s > 0 else 0.0
    if limits.read_gb_s <= 0 or in_cache(series, limits):
        return 0.0
    return series.gb_s / limits.read_gb_s


def values(model: Model, limits: Limits, test: str = "") -> dict[str, float]:
    """The numbers goals speak of, those that are known; of one test, or of the first of each kind."""
    found = {}
    if (decode := model.find(OURS, "tg", test)) and decode.median > 0:
        found["tokens_per_second"] = decode.median
        found["ms_per_token"] = 1000 / decode.median
        if (part := share(decode, limits)) > 0:
            found["read_share"] = part
    if (prefill := model.find(OURS, "pp", test)) and prefill.median > 0:
        if prefill.per_step:
            found["prefill_ms"] = 1000 / prefill.steps_per_second
        if (part := share(prefill, limits)) > 0:
            found["matmul_share"] = part
    for ratio in model.ratios:
        if ratio.samples and (ratio.test == test or (not test and ratio.test.startswith("tg"))):
            found.setdefault(f"times {ratio.peer}", ratio.median)
    if start := model.find(OURS, "start"):
        found["start_s"] = start.median
    if model.build.seconds > 0:
        if model.build.cold:
            found["build_s"] = model.build.seconds
        if model.build.peak_bytes and model.checkpoint_bytes:
            found["build_peak_over_checkpoint"] = model.build.peak_bytes / model.checkpoint_bytes
    return found


def judge(goal: Goal, found: dict[str, float]) -> Goal:
    """The goal with the value measured for it."""
    if goal.what not in found:
        return replace(goal, value=0.0, known=False, reached=False, reached_then=False)
    value = float(found[goal.what])

    def meets(target: float) -> bool:
        return value <= target if goal.relation == "<=" else value >= target

    return replace(
        goal, value=value, known=True, reached=meets(goal.target), reached_then=goal.then > 0 and meets(goal.then)
    )


def summarize(model: Model, limits: Limits) -> None:
    """Bring the model's ratios and goals up to date with its series and the ceilings."""
    model.ratios = []
    peers = list(dict.fromkeys(s.engine for s in model.series if s.engine != OURS))
    for ours in (s for s in model.series if s.engine == OURS and s.samples):
        for peer in peers:
            if theirs := _counterpart(model, ours, peer):
                model.ratios.append(pairwise(ours, theirs))
    model.goals = [judge(goal, values(model, limits, goal.test)) for goal in model.goals]


def _counterpart(model: Model, ours: Series, peer: str) -> Series | None:
    """The peer's series of the same test; where ours is the only one of its kind, also one over fewer tokens."""
    if same := model.find(peer, ours.test, ours.test):
        return same
    kind = _kind(ours.test)
    if sum(s.engine == OURS and _kind(s.test) == kind for s in model.series) > 1:
        return None
    alike = (s for s in model.series if s.engine == peer and s.samples and _kind(s.test) == kind)
    return next(alike, None)


def _kind(test: str) -> str:
    """A test without its number of tokens: "tg128 @ d1024" is of the kind "tg @ d1024"."""
    return re.sub(r"^(tg|pp)\d+", r"\1", test)
