"""MTP-1: DeepSeek's next-token module, one draft a round."""

from deepspec.drafters.mtp.model import MtpDrafter

__all__ = ["MtpDrafter"]
