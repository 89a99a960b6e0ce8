"""The paper's figures in kind, from commands of this program run one after the other."""
