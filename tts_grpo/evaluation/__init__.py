"""Comparison of the models before and after training.

- ``protocols``: error rates as published evaluations compute them; ``bootstrap``: intervals.
- ``aggregate``: figures of a model over utterances and seeds, and differences between two models.
- ``report``: the HTML report of an experiment.

Speech environment only. Imports ``speech`` and ``text``, no other room imports it.
"""
