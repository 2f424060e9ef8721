"""What follows from the measured series: ratios to the peers, and which goals are reached."""

from __future__ import annotations

from dataclasses import replace

from .results import OURS, Goal, Model, pairwise


def bandwidth(model: Model) -> float:
    """GB/s that decoding reads: bytes per token times tokens per second (median); 0 when not measured."""
    decode = model.find(OURS, "tg")
    return model.traffic.total * decode.median / 1e9 if decode else 0.0


def in_cache(model: Model, l3_bytes: int) -> bool:
    """Whether the weights stay in the cache from step to step, so that memory bandwidth says nothing about them."""
    return model.traffic.total <= l3_bytes


def values(model: Model, read_gb_s: float, l3_bytes: int) -> dict[str, float]:
    """The numbers goals speak of, those that are known."""
    found = {}
    if (decode := model.find(OURS, "tg")) and decode.median > 0:
        found["tokens_per_second"] = decode.median
        found["ms_per_token"] = 1000 / decode.median
        if read_gb_s > 0 and model.traffic.total and not in_cache(model, l3_bytes):
            found["read_share"] = bandwidth(model) / read_gb_s
    if start := model.find(OURS, "start"):
        found["start_s"] = start.median
    if model.build.seconds > 0:
        found["build_s"] = model.build.seconds
    if model.build.peak_bytes and model.checkpoint_bytes:
        found["build_peak_over_checkpoint"] = model.build.peak_bytes / model.checkpoint_bytes
    return found


def judge(goal: Goal, found: dict[str, float]) -> Goal:
    """The goal with the value measured for it."""
    if goal.what not in found:
        return replace(goal, value=0.0, known=False, reached=False)
    value = found[goal.what]
    reached = value <= goal.target if goal.relation == "<=" else value >= goal.target
    return replace(goal, value=float(value), known=True, reached=reached)


def summarize(model: Model, read_gb_s: float, l3_bytes: int) -> None:
    """Bring the model's ratios and goals up to date with its series and the ceiling."""
    model.ratios = []
    peers = list(dict.fromkeys(s.engine for s in model.series if s.engine != OURS))
    for kind in ("tg", "pp", "start", "peak"):
        ours = model.find(OURS, kind)
        for peer in peers:
            theirs = model.find(peer, kind)
            if ours and theirs:
                model.ratios.append(pairwise(ours, theirs))
    found = values(model, read_gb_s, l3_bytes)
    model.goals = [judge(goal, found) for goal in model.goals]
