"""Quantization that looks at activations: GPTQ, AWQ and mixed precision by budget, streamed layer by layer.

Between the plan, which says what each weight's parts are, and the weights file, which asks for their values.
"""
