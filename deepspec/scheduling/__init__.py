"""Verify no more than pays: calibrated confidences, a throughput table, and the schedulers."""
