"""Batch jobs: prompts of any number to results that survive anything, by parts; knows pairs, not their engines."""
