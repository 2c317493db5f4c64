"""Texts and tokens: text normalisation, units of a text, alignment of two texts, and prompts.

- ``clean`` converts raw text to plain text with character offsets. ``spoken`` converts plain text to words, with
  ``readings``, ``numbers`` and ``measures``. ``units`` cuts the words into characters and words with pronunciations.
  ``errors`` computes alignments, error counts and error rates.
- ``rules`` decides which texts are accepted and what the language model reads. ``tags`` finds tags and control tokens.
- ``tokens`` converts speech token ids to and from text; ``prompts`` renders prompts and holds the chat templates.
- ``input_files`` validates users' files. ``jsonl`` reads JSON Lines files and writes JSON files atomically.

This package is imported in both environments (speech and trainer). It imports no other package of tts_grpo.
"""
