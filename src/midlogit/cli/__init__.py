"""The command line: arguments in, text or JSON on stdout, the rest on stderr."""
