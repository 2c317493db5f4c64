"""The HTML report of an experiment: one file with tables, plots, alignments and audio."""
