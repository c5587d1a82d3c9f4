"""Attention put into somebody else's network, and taken out again; the network's own state_dict keys stay.

``places`` says which modules a place means, ``hosts`` how an inserted module lives in its host, ``inference`` what
flows at a place, ``evidence`` on which axis its channels are; ``insertion`` and ``replacement`` do the work, and
``report`` says what was done.
"""

from .insertion import insert, remove
from .replacement import replace
from .report import Change, Report

__all__ = ["Change", "Report", "insert", "remove", "replace"]
