"""The report of an experiment: what is in its folder, as tables, plots, alignments and sound, in one HTML file."""
