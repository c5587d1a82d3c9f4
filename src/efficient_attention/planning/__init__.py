"""Where attention could go in a network, what it would cost and what fits a memory, before anything is allocated.

``simulation`` runs a model without memory, ``temporaries`` says what operators hold meanwhile, ``candidates`` which
modules could take attention and ``kinds`` which attention; ``costing`` adds a model and attention up, ``runs`` does so
for all places, and ``plan`` is the public function.
"""

from .plan import plan
from .result import Cost, Plan, PlannedPlace

__all__ = ["Cost", "Plan", "PlannedPlace", "plan"]
