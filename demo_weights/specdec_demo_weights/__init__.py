"""Weights of two drafters for SmolLM2-135M-Instruct: a feature drafter and Medusa heads."""
