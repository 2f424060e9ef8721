"""Checkpoints that somebody else has quantized: read strictly, repacked while they stream, never requantized."""
