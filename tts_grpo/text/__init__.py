"""Texts and tokens: what a sentence's units are, how texts differ, and how a prompt is written.

- ``clean``: raw text -> plain text with places; ``spoken``: -> its words, by ``readings``, ``numbers``, ``measures``;
  ``units``: -> characters and words with their sounds; ``errors``: alignments, error counts and error rates.
- ``tokens``: ids of speech tokens and their text form; ``prompts``: prompts and the chat template.
- ``jsonl``: JSON Lines files, and JSON files that appear only when whole.

Both environments. Imports no other room.
"""
