"""`python -m deepspec`, and so `torchrun -m deepspec train ...`."""

from deepspec.cli import main

if __name__ == "__main__":
    main()
