"""What the paper reports: Cheng et al., "DSpark: Confidence-Scheduled Speculative Decoding with
Semi-Autoregressive Generation", 2026. Facts only."""

from __future__ import annotations

from statistics import fmean

SOURCE = "DSpark, Cheng et al. 2026"
DOMAINS = {
    "math": ("GSM8K", "MATH", "AIME25"),
    "code": ("MBPP", "HumanEval", "LiveCodeBench"),
    "chat": ("MT-Bench", "Alpaca", "Arena-Hard"),
}
# table 1: accepted length at temperature 1, target Qwen3-4B, in the order of DOMAINS
TABLE1 = {
    "dspark": (6.11, 5.70, 4.89, 5.13, 5.38, 4.86, 3.64, 3.54, 3.29),
    "dflash": (5.40, 4.85, 4.15, 4.40, 4.74, 4.18, 3.07, 2.96, 2.83),
    "eagle3": (5.14, 4.62, 3.92, 3.69, 4.16, 3.77, 2.39, 2.26, 2.55),
}
CHAT_ACCEPTANCE = (0.457, 0.957)  # figure 5: the ends of the threshold sweep on chat
ECE_BEFORE, ECE_AFTER = (0.03, 0.08), 0.01  # figure 6
AUC = (0.81, 0.91)
THROUGHPUT_GAIN = 0.51  # figure 7: V4-Flash at 80 tokens/s/user, over MTP-1
SPEED_GAIN = (0.60, 0.85)  # figure 7: tokens/s/user at matched throughput, over MTP-1


def lengths(kind: str) -> dict[str, float]:
    """Accepted length by domain (each the mean of its three benchmarks), and their mean."""
    row = TABLE1[kind]
    found = {name: fmean(row[3 * i : 3 * i + 3]) for i, name in enumerate(DOMAINS)}
    return {**found, "mean": fmean(row)}


def gain(kind: str) -> float:
    """Of DSpark's mean accepted length over another drafter's."""
    return lengths("dspark")["mean"] / lengths(kind)["mean"] - 1
