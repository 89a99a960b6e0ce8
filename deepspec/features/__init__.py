"""Features of the frozen target, from wherever they come: one interface, the same numbers."""
