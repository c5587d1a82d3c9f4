"""Training, evaluation and prediction by recipes, on Lightning.

Every file here is imported by its own name; :mod:`.command` is what the command line calls.
"""
