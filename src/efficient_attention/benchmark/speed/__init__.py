"""How fast attention is and what memory it takes, beside everything else that computes it or stands in its place.

``problems`` says what is asked, ``entries`` what answers: the library, ``operator_entries`` and ``module_entries``,
other packages in ``packages``, floors in ``floors``. ``gate`` lets in who is right, ``timing`` times in turns,
``measurement`` does all of it for one problem, ``allocators`` in processes with a setting of the allocator, and
``sweep`` for a grid, as a record. ``orders`` holds the planner against measurement, ``advice`` answers one user.
``tables``, ``curves`` and ``document`` show records; ``arguments`` is the command line.
"""
