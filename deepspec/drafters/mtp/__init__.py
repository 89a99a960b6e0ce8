"""MTP-1: DeepSeek's next-token module, one draft a round."""

from deepspec.drafters.mtp.model import MtpDrafter, resolve_config

__all__ = ["MtpDrafter", "resolve_config"]
