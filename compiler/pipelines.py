"""The order of all passes, in one readable list by phase. No other file orders passes."""

from __future__ import annotations

from collections.abc import Sequence

from ..artifacts.errors import UsageError
from ..passes.base import GraphPass
from ..passes.cache.attention_step import FuseAttentionStep
from ..passes.cache.paged import InsertKVCache
from ..passes.cleanup.canonicalize import Canonicalize
from ..passes.cleanup.common_subexpressions import CommonSubexpressions
from ..passes.cleanup.fold_constants import FoldConstants
from ..passes.cleanup.linear import UnifyLinear
from ..passes.fusion.add_norm import FuseAddNorm
from ..passes.fusion.fused_linear import FuseLinear
from ..passes.fusion.gated_activation import FuseGatedActivation
from ..passes.fusion.merge_projections import MergeProjections
from ..passes.fusion.position_tables import PositionTables
from ..passes.fusion.rms_norm import FuseRMSNorm
from ..passes.fusion.rope import FuseRoPE
from ..passes.plan.kernels import SelectKernels
from ..passes.plan.last_token import GatherLastToken
from ..passes.plan.nibbles import OrderNibbles
from ..passes.plan.pack_weights import PackWeights
from ..passes.plan.sample import SampleTokens
from ..passes.plan.static_buffers import PlanStaticBuffers
from ..passes.quantize.keep import KeepQuantized
from ..passes.quantize.kv_cache import QuantizeKVCache
from ..passes.quantize.weights import QuantizeWeights

# Clean up: one spelling for one meaning.
CLEANUP: tuple[GraphPass, ...] = (
    Canonicalize(),
    UnifyLinear(),
    CommonSubexpressions(),
    FoldConstants(),
)

PIPELINE: tuple[GraphPass, ...] = (
    *CLEANUP,
    # fuse: fewer, larger ops
    PositionTables(),
    FuseRMSNorm(),
    FuseAddNorm(),
    FuseRoPE(),
    MergeProjections(),
    FuseGatedActivation(),
    GatherLastToken(),
    # cache: from a function of a whole sequence to one step over a paged cache
    InsertKVCache(),
    QuantizeKVCache(),
    FuseAttentionStep(),
    SampleTokens(),
    # quantize: what the checkpoint holds so, and what the recipe says
    KeepQuantized(),
    QuantizeWeights(),
    # plan: what runs where
    FuseLinear(),
    OrderNibbles(),
    SelectKernels(),
    PackWeights(),
    PlanStaticBuffers(),
)

# Without these a graph cannot become an engine; bisection keeps them, and no recipe can skip them.
STRUCTURAL = ("canonicalize", "gather-last-token", "insert-kv-cache", "sample-tokens", "plan-static-buffers")
REQUIRED = frozenset({*STRUCTURAL, "order-nibbles", "select-kernels"})


def select(skip: Sequence[str] = (), passes: Sequence[GraphPass] = PIPELINE) -> list[GraphPass]:
    """The passes of a build, in order, without those the recipe skips.

    Raises:
        UsageError: a name that is no pass, or a pass an engine cannot do without.
    """
    names = [p.name for p in passes]
    for name in skip:
        if name not in names:
            raise UsageError(f"passes.skip names {name!r}, which is no pass", "", f"the passes are: {', '.join(names)}")
        if name in REQUIRED:
            why = "no engine can be built without it"
            raise UsageError(f"pass {name!r} cannot be skipped", why, "remove it from passes.skip")
    return [p for p in passes if p.name not in skip]
