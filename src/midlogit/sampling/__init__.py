"""The policy: what a request asks for, applied to row pairs; no engine and no tokenizer files."""
