"""Ingot's custom ops: declared by their plain PyTorch semantics, which are the oracle of every kernel.

Importing `ingot.runtime.ops.schema` registers them; nothing else of the runtime imports torch from here.
"""
