"""Evaluation of what a run has learned: perplexity, generation, and the scores of generated text."""
