"""Where logits come from: each engine feeds sequences with row pairs and knows nothing of α."""
