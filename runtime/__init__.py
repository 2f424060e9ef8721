"""The lean runtime: loads an artifact and generates, without transformers and without a compiler.

Its core imports numpy only; tokenizers, the template worker and the engines' libraries come in when first needed.
"""

from .llm import LLM
from .outputs import CompletionOutput, RequestOutput
from .params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]
