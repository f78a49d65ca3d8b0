"""The flags of `cwpo sft` under torchrun: `torchrun --nproc-per-node N -m cwpo_trainer.sft`."""

from cwpo_trainer.commands import Sft
from cwpo_trainer.run.launch import main

if __name__ == "__main__":
    main(Sft, "python -m cwpo_trainer.sft")
