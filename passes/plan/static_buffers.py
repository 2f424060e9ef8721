"""Plans an engine's static buffers: which inputs the host writes, which the device keeps."""

from __future__ import annotations

from ..base import Context, Outcome
from ..graph import TracedGraph
from ..stages import Stage

_ROLES = {"tokens": "step", "positions": "step", "last_index": "step", "block_tables": "sequence"}


class PlanStaticBuffers:
    """Fixes the order, shape and role of every input, so that an engine's run can be captured once and replayed."""

    name = "plan-static-buffers"
    needs = Stage.CACHED
    leaves = Stage.PLANNED
    exact = True

    def run(self, traced: TracedGraph, ctx: Context) -> Outcome:
        """The graph stays as it is; the plan is a fact for the artifact.

        Roles: "step" is written before each run (or advanced on the device), "sequence" when a sequence joins,
        "cache" is device state that no host writes.
        """
        buffers = []
        for node in traced.graph.nodes:
            if node.op != "placeholder":
                continue
            value = node.meta["val"]
            role = "cache" if "_cache_" in node.target else _ROLES.get(node.target, "sequence")
            buffers.append(
                {
                    "name": node.target,
                    "shape": list(value.shape),
                    "dtype": str(value.dtype).removeprefix("torch."),
                    "role": role,
                }
            )
        return Outcome(facts={"inputs": buffers, "static": True})
