"""Ingot compiles Hugging Face language models ahead of time into a folder that a lean runtime loads in seconds.

Four floors, imports only point down: `artifacts` (the contract) <- `runtime` <- `passes` <- `compiler`.
"""

__version__ = "0.1.0"
