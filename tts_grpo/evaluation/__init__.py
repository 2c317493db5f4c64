"""Evaluation: comparison of the models before and after training.

- ``protocols`` computes error rates as published evaluations do. ``bootstrap`` computes confidence intervals.
- ``aggregate`` computes the metrics of a model over utterances and seeds, and differences between two models.
- ``provenance`` records date, commit, machine and command of a measurement.
- ``memory`` measures the memory of a run.
- ``report`` renders the HTML report of an experiment.

This package is imported in the speech environment only. It imports ``speech`` and ``text``, and no other package of
tts_grpo imports it.
"""
