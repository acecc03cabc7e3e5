"""The mathematics of q*: rows of logits in, distributions and diagnostics out; no I/O, no engine, no tokenizer."""
