"""Measurements that are recorded with all that they follow from, for the documentation to quote.

``comparison`` does an experiment: ``experiment`` says what is compared, ``runs`` trains and tests it in processes of
its own, ``spread`` sums up over seeds. ``capacity`` tells what fits a memory, ``loading`` whether data keeps up, and
``samples`` what it costs. ``speed`` is time and memory beside everybody else's. ``tables`` shows records, and
``provenance`` says what they follow from.
"""
