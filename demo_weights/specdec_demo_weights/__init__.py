"""Weights of three drafters for SmolLM2-135M-Instruct: a feature drafter, Medusa heads, and an EAGLE-3 checkpoint."""
