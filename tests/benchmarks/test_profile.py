"""The profile of a plan engine on a fake GPU whose clock counts launches."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
from ingot.artifacts.errors import UsageError
from ingot.artifacts.kernel_plan import KernelPlan, PlanArgument, PlanLaunch
from ingot.benchmarks import profile as profiling
from ingot.benchmarks.gpu_ceilings import Ceilings
from ingot.benchmarks.profile import Kind, Profile, main, profile, render
from ingot.benchmarks.results import Pass
from ingot.benchmarks.step_timer import MOST_STEPS
from ingot.runtime.engines.cuda import Driver

from ..runtime.fake_cuda import FakeDriver, FakeEvent
from ..runtime.plan_artifact import KERNELS, plan_manifest, write_plan_artifact

LENGTH = MOST_STEPS + 100
COST_US = {"scatter": 1.0, "model": 0.0, "advance": 3.0}


class Clock(FakeDriver):
    """Kernels do nothing but take their time; nothing is computed, so that thousands of steps are quick."""

    def __init__(self) -> None:
        super().__init__({name: self._kernel(name) for name in KERNELS}, total=1 << 26)
        self.now = 0.0

    def _kernel(self, name: str) -> Any:
        def run(gpu: FakeDriver, *values: object) -> None:
            self.now += COST_US[name]
            if name == "advance":
                KERNELS[name](gpu, *values)
            if name == "model":
                gpu.view(int(values[-2]), 8, "int64")[:] = 1  # type: ignore[call-overload]

        return run

    def record(self, event: FakeEvent, stream: Any) -> None:
        super().record(event, stream)

        def note() -> None:
            event.at = self.now  # type: ignore[attr-defined]

        self._enqueue("record", stream, note)
        # The time is noted before the event happens.
        queue = stream.waiting if stream.recording is None else stream.recording
        queue[-2:] = reversed(queue[-2:])

    def elapsed_ms(self, start: FakeEvent, end: FakeEvent) -> float:
        return (end.at - start.at) / 1000  # type: ignore[attr-defined]


def label(name: str, plan: KernelPlan) -> KernelPlan:
    """The decode plan as a compiler would label it: two scatters, and a model that reads."""
    first, *rest = plan.launches
    launches = [dataclasses.replace(first, label="cache_write")] * 2
    launches += [dataclasses.replace(launch, read_bytes=3000 if launch.label == "model" else 0) for launch in rest]
    return dataclasses.replace(plan, launches=tuple(launches))


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(profiling, "require_target", lambda target, what: None)
    return write_plan_artifact(
        tmp_path / "a", label, manifest=plan_manifest(batches=(1,), max_length=LENGTH, num_blocks=LENGTH)
    )


def test_kinds_are_timed_alone_and_the_graph_as_a_whole(artifact: Path) -> None:
    gpu = Clock()
    found = profile(artifact, "decode-b1", 10, lambda: cast(Driver, gpu))
    assert [(k.label, len(k.places), k.read_bytes) for k in found.kinds] == [
        ("advance", 1, 0), ("cache_write", 2, 0), ("model", 1, 3000)
    ]  # fmt: skip
    assert [k.seconds for k in found.kinds] == pytest.approx([3e-6, 2e-6, 0.0])
    assert found.seconds == pytest.approx(5e-6)
    assert not gpu.memory and not gpu.live and not gpu.host and gpu.closed


def test_what_cannot_be_profiled(artifact: Path) -> None:
    with pytest.raises(UsageError, match="decode-b9"):
        profile(artifact, "decode-b9", 10)
    with pytest.raises(UsageError, match="too long"):
        profile(artifact, "decode-b1", 100)


def test_attention_reads_what_it_sees() -> None:
    manifest = plan_manifest(batches=(2,))
    entry = next(e for e in manifest.engines if e.phase == "decode")
    layer = manifest.kv_cache.layers[0]
    token = (layer.key[0] * layer.key[1] + layer.value[0] * layer.value[1]) * 4
    arguments = tuple(PlanArgument("cache", name, 0, 8, "", 0, 0.0) for name in ("k_cache_0", "v_cache_0"))
    launch = PlanLaunch(0, (1, 1, 1), arguments, False, "attention_step h4", 0)
    assert profiling.cache_read_bytes(launch, entry, manifest, 9) == 2 * 10 * token
    assert profiling.cache_read_bytes(dataclasses.replace(launch, label="cache_write"), entry, manifest, 9) == 0
    windowed = dataclasses.replace(
        manifest, kv_cache=dataclasses.replace(manifest.kv_cache, layers=(dataclasses.replace(layer, window=4),))
    )
    assert profiling.cache_read_bytes(launch, entry, windowed, 9) == 2 * 4 * token


FOUND = Profile(
    "decode-b1", 1, 1024, [Kind("big", [0, 2], 8 * 10**6, 4e-6), Kind("small", [1], 10**6, 1e-6), Kind("none", [3])],
    4.5e-6,
)  # fmt: skip


def test_the_table_shows_shares_of_the_ceiling() -> None:
    lines = render(FOUND, 4000.0, 2 * 10**6).splitlines()
    rows = {c[0].strip(): [x.strip() for x in c[1:]] for c in (line.strip("| ").split(" | ") for line in lines[4:])}
    assert "ceiling 4000 GB/s" in lines[0]
    assert rows["big"] == ["2", "2.00", "4.0", "80.0%", "8.00", "2000", "50%"]
    assert rows["small"][-1] == "in cache"
    assert rows["none"][3:] == ["0.0%", "", "", ""][: len(rows["none"]) - 3]
    assert rows["whole graph"][2:] == ["4.5", "90.0%", "9.00", "2000", "50%"]


def test_the_command(artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(profiling, "gpu_ceilings", lambda timeout: Ceilings(l2_bytes=5, reads=[Pass("a", 1000.0)]))
    monkeypatch.setattr(profiling, "profile", lambda *arguments: FOUND)
    assert main([str(artifact)]) == 0
    assert "read ceiling 1000 GB/s" in capsys.readouterr().out
    monkeypatch.undo()
    assert main([str(artifact), "--engine", "nothing", "--ceiling", "4000"]) == 2
    assert "error:" in capsys.readouterr().err
