"""Our worker's answers, over the whole runtime on a fake GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ingot.benchmarks import ours
from ingot.runtime import LLM
from ingot.runtime.engines.plan import PlanGroup
from ingot.runtime.loader import open_verified

from ..runtime.fake_cuda import FakeDriver
from ..runtime.plan_artifact import KERNELS, plan_manifest, write_plan_artifact

PROMPTS = [[3, 1, 4, 1], [5, 9, 2, 6], [5, 3, 5, 8]]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., LLM]]:
    made: list[LLM] = []

    def llm(total: int = 1 << 24) -> LLM:
        manifest = plan_manifest(batches=(1, 4), max_length=32)
        artifact = open_verified(write_plan_artifact(tmp_path / "a", manifest=manifest), "full")
        group = PlanGroup(artifact, make_driver=lambda: FakeDriver(KERNELS, total=total))  # type: ignore[arg-type,return-value]
        made.append(LLM(artifact, engine_group=group))
        return made[0]

    yield llm
    for one in made:
        one.close()


def test_seconds_are_of_what_follows_the_first_token(make: Callable[..., LLM]) -> None:
    llm = make()
    answer = ours.decode(llm, {"prompt": PROMPTS[0], "tokens": 6})
    assert answer["seconds"] > 0 and len(answer["token_ids"]) == 7
    assert len(ours.prefill(llm, {"prompt": PROMPTS[0]})["token_ids"]) == 1
    assert ours.batch(llm, {"prompts": PROMPTS, "tokens": 6})["seconds"] > 0


def test_rows_that_do_not_fit_together_are_no_batch(make: Callable[..., LLM]) -> None:
    llm = make()
    with pytest.raises(RuntimeError, match="did not decode together"):
        ours.batch(llm, {"prompts": PROMPTS * 2, "tokens": 6})
