"""Data sets: of files as they are published, and generated with exact truth.

Every file here is imported by its own name, so that a data set loads what it needs and no more.
"""
