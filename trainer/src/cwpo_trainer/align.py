"""The flags of `cwpo align` under torchrun: `torchrun --nproc-per-node N -m cwpo_trainer.align`."""

from cwpo_trainer.commands import Align
from cwpo_trainer.run.launch import main

if __name__ == "__main__":
    main(Align, "python -m cwpo_trainer.align")
