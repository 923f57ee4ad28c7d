"""How memory, messages and work are split over GPUs: one module per strategy.

This package imports the standard library only. A strategy never sees a model, a GPU or another
strategy; it answers four questions about :class:`~strategies.base.Term` objects.
"""
