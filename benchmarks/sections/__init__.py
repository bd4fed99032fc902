"""The sections of the page of results: a file for each benchmark, with its text and its tables."""
