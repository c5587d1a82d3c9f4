"""Measurements that are recorded with all that they follow from, for the documentation to quote.

``experiment`` says what is compared, ``runs`` trains and tests it in processes of its own, ``spread`` sums up over
seeds, ``tables`` shows it, ``provenance`` says what a record follows from, and ``comparison`` does it all.
"""
