"""Knowing before starting: parameters, memory, disk, traffic and steps of a config, by formula.

Nothing here computes with weights: the target and the drafter are built on torch's meta device, and
every size is a sum of shapes. `tests/planning` holds the sums against what real steps allocate.
"""
