"""DeepSpec: distill a speculative-decoding drafter from your own frozen target model."""

__version__ = "0.2.0"
