"""Chat prompts about code whose answers are long; the benchmarks of a real pair ask them in turn."""

from __future__ import annotations

PROMPTS = [
    "Write a Python class for an LRU cache with get, put and a maximum size, and explain each method.",
    "Write a Python function that parses a CSV file with quoted fields without using the csv module.",
    "Implement binary search, insertion sort and merge sort in Python, each with a docstring.",
    "Write a command line tool in Python that counts words, lines and characters of several files.",
    "Explain how a hash table handles collisions and implement one with open addressing in C.",
    "Write a Go program that downloads a list of URLs concurrently with a limit of ten at a time.",
    "Implement a thread-safe bounded queue in Java using locks and conditions.",
    "Write a SQL schema for a library with books, members and loans, and five useful queries.",
    "Write a JavaScript function that debounces another function, and show how to test it.",
    "Implement Dijkstra's algorithm in Python with a heap, and run it on a small example.",
    "Write a Rust function that reads a file and returns the ten most frequent words.",
    "Refactor this into smaller functions: def f(a): r=[]\nfor x in a:\n  if x%2==0: r.append(x*x)\nreturn sum(r)",
    "Write unit tests with pytest for a function that converts Roman numerals to integers.",
    "Explain Python decorators and write one that retries a function with exponential backoff.",
    "Write a React component that shows a paginated table with sorting by column.",
    "Implement a trie in C++ with insert, search and prefix search.",
    "Write a bash script that backs up a directory every day and keeps the last seven copies.",
    "Write a Python script that renames photos by the date on which they were taken.",
    "Explain the difference between processes and threads, with an example of each in Python.",
    "Write a Dockerfile and a compose file for a Flask application with a PostgreSQL database.",
    "Implement matrix multiplication in C with blocking for the cache, and explain why it is faster.",
    "Write a recursive descent parser in Python for arithmetic expressions with parentheses.",
    "Write a Python program that plays tic-tac-toe against the user with minimax.",
    "Explain what a deadlock is and fix one in a small Java program that you write.",
    "Write an HTTP server in Python's standard library that stores notes in SQLite.",
    "Implement a generic binary tree in TypeScript with an iterator in order.",
    "Write a regular expression for e-mail addresses and explain each part of it.",
    "Write a Makefile for a small C project with a library, a program and tests.",
    "Implement gradient descent for linear regression in numpy and plot the loss.",
    "Write a Python context manager that times a block and logs the result.",
    "Convert this loop to a list comprehension and a generator, and compare memory: for i in range(n): out.append(i*i)",
    "Write a Python function that finds all anagrams in a list of words, and analyse its complexity.",
]


def chats(start: int, count: int) -> list[str]:
    """`count` prompts from number `start` on, from the first again after the last."""
    return [PROMPTS[number % len(PROMPTS)] for number in range(start, start + count)]
