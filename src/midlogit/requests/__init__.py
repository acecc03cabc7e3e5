"""One request from its prompt to its completion; knows no engine."""
