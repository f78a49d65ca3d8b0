"""The flags of `cwpo online` under torchrun: `torchrun --nproc-per-node N -m cwpo_trainer.online`.

Several processes need --update immediate.
"""

from cwpo_trainer.commands import Online
from cwpo_trainer.run.launch import main

if __name__ == "__main__":
    main(Online, "python -m cwpo_trainer.online")
