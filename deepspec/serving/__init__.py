"""Serving-like load: requests that arrive, run together and leave; for real, and simulated."""
