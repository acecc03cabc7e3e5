"""Rows of logits and settings in, token ids now and Decisions later."""
