"""From a Hugging Face module on `meta` to one flat graph of fixed shape: tokens and positions in, logits out.

The graph is a pure function; it holds ATen ops and `ingot.attention`, its weights stand as flat attributes, and
`Weights` remembers where the value of each comes from. The KV cache and sampling are put in by passes.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from ..artifacts.errors import IngotError, UnsupportedModelError
from ..passes.graph import TracedGraph, meta_like
from ..passes.weights import Constant, Stored, Weights
from ..runtime.ops.schema import overload

# Chunked attention is refused where it is called, with its own reason.
_CACHED_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")


class _LogitsOnly(nn.Module):
    """The model as a function of tokens and positions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens, position_ids=positions, use_cache=False).logits


def trace(model: nn.Module, batch: int, length: int) -> TracedGraph:
    """Trace `model` (from `make_model`) for tokens [batch, length].

    Returns:
        The graph with placeholders tokens, positions [batch, length] int64 and the output logits
        [batch, length, vocabulary].

    Raises:
        UnsupportedModelError: the model does not trace, or keeps state other than attention's keys and values.
    """
    name = type(model).__name__
    _check_layers(model)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    shadow = _LogitsOnly(model)
    inputs = tuple(torch.zeros(batch, length, dtype=torch.int64, device="meta") for _ in range(2))
    try:
        with torch.no_grad(), _buffers_on_meta(model):
            program = torch.export.export(shadow, inputs, strict=False)
            gm = program.run_decompositions({}).module(check_guards=False)
    except IngotError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, IngotError) else None
        if cause is not None:
            raise cause from error
        raise UnsupportedModelError(
            f"{name} cannot be traced for tokens [{batch}, {length}]",
            f"{type(error).__name__}: {_first_line(error)}",
            "models with data-dependent control flow or state other than a KV cache are not supported",
        ) from error
    attentions = sum(n.target is overload("attention") for n in gm.graph.nodes)
    layers = getattr(model.config, "num_hidden_layers", attentions)
    if 0 < attentions < layers:
        raise UnsupportedModelError(
            f"{name} has {layers} layers, but only {attentions} keep their state in attention's keys and values",
            "the others carry state of another kind (state space, linear attention, convolution), which is not cached",
            "use a model that has nothing but attention",
        )
    if not attentions:
        raise UnsupportedModelError(
            f"{name} has no attention seam",
            "it does not call transformers' attention interface",
            "use a model whose attention can be replaced (attn_implementation)",
        )
    return _flatten(gm, buffers)


def _check_layers(model: nn.Module) -> None:
    """Refuse by transformers' own words for a layer's kind: tracing what is refused in the end can take minutes."""
    kinds = dict.fromkeys(getattr(model.config, "layer_types", None) or ())
    other = [str(kind) for kind in kinds if kind not in _CACHED_LAYERS]
    if other:
        raise UnsupportedModelError(
            f"{type(model).__name__} has layers of the kind {', '.join(other)}",
            "their state is not the keys and values of causal or sliding-window attention, which alone is cached",
            "use a model that has nothing but such attention",
        )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:300] if text else ""


class _buffers_on_meta:
    """While tracing, buffers must live where the parameters do; their values are put back afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.slots = [(m, n, b) for m in model.modules() for n, b in m._buffers.items() if b is not None]

    def __enter__(self) -> None:
        for module, name, buffer in self.slots:
            module._buffers[name] = buffer.to("meta")

    def __exit__(self, *_: object) -> None:
        for module, name, buffer in self.slots:
            module._buffers[name] = buffer


def _flatten(gm: fx.GraphModule, buffers: dict[str, torch.Tensor]) -> TracedGraph:
    """One graph with plain placeholders and outputs, flat weight attributes, and no trace of the meta device."""
    weights = Weights()
    root = nn.Module()
    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    names = iter(("tokens", "positions"))
    for node in gm.graph.nodes:
        if node.op == "call_module" or (node.op == "call_function" and "guards" in str(node.target)):
            continue
        if node.op == "placeholder":
            new = graph.placeholder(next(names))
        elif node.op == "get_attr":
            source = str(node.target).removeprefix("model.")
            value = _attribute(gm, str(node.target))
            attr = Weights.attribute(source)
            if attr not in weights.entries:
                known = buffers.get(source, value)
                if known.device.type == "meta":
                    weights.entries[attr] = Stored(source, tuple(value.shape), value.dtype)
                else:
                    weights.entries[attr] = Constant(known.detach().clone())
                root.register_buffer(attr, meta_like(value))
            new = graph.get_attr(attr)
        elif node.op == "output":
            logits = fx.node.map_arg(node.args[0], lambda n: mapped[n])
            new = graph.output(logits[0] if isinstance(logits, tuple | list) else logits)
        else:
            new = graph.node_copy(node, lambda n: mapped[n])
            if isinstance(new.kwargs.get("device"), torch.device):
                new.kwargs = {**new.kwargs, "device": torch.device("meta")}
        value = node.meta.get("val")
        new.meta = {"val": meta_like(value)} if isinstance(value, torch.Tensor) else {"val": value}
        if node.op not in ("placeholder", "output"):
            new.meta["source"] = _module_path(node)
        mapped[node] = new
    flat = fx.GraphModule(root, graph)
    flat.graph.eliminate_dead_code()
    flat.recompile()
    return TracedGraph(flat, weights)


def _attribute(gm: nn.Module, path: str) -> torch.Tensor:
    *parents, leaf = path.split(".")
    for part in parents:
        gm = getattr(gm, part)
    return getattr(gm, leaf)


def _module_path(node: fx.Node) -> str:
    """Where in the Hugging Face module the op came from, for reports: `model.layers.0.self_attn`."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return paths[-1].removeprefix("model.") if paths else ""
