"""Tasks of lm-eval, EleutherAI's evaluation harness: run, compared, and choosing layers.

Imports the ground, model.
"""
