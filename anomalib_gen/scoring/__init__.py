"""Scheduled scoring: files in, scores out, in bounded memory and with nothing lost; the commands of `cli` call these.

_columns   what a model wants to know of a row, and what a file has
sources    files, folders and globs as parts of a fixed number of rows
parts      finished parts on the disk, so that a killed run goes on where it was
sinks      the result as one file or a folder of them, complete or not there
rows       a saved model, and the scores of rows that may be bad
run        reading, scoring and writing at the same time, with the threads of `overlap`
remote     outputs in object stores
fitting    a model from files; evaluation: figures from labelled files
calibrating   a threshold or p-values for a saved model from files of normal rows
explaining    which columns make rows anomalous, beside their scores; explaining_files: in a file of its own
monitor    a scored batch against the training reference, with `anomalib_gen.monitoring`
reporting     what is to say of a run; page: that as one HTML file
config     options from flags and one TOML file
commands, operations   the command line
"""
