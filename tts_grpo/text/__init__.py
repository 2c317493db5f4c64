"""Texts and tokens: what a sentence's units are, how texts differ, and how a prompt is written.

- ``units``: normalisation, characters, pinyin; ``errors``: alignments, error counts and error rates.
- ``tokens``: ids of speech tokens and their text form; ``prompts``: prompts and the chat template.
- ``jsonl``: JSON Lines files, and JSON files that appear only when whole.

Both environments, except ``errors``: its package rapidfuzz is in the speech environment only. Imports no other room.
"""
