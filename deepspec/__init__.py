"""DeepSpec: distill a speculative-decoding drafter from your own frozen target model."""

__version__ = "0.1.1"
