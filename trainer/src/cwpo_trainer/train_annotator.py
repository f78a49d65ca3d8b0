"""`cwpo train-annotator` under torchrun: `torchrun -m cwpo_trainer.train_annotator`."""

from cwpo_trainer.commands import TrainAnnotator
from cwpo_trainer.run.launch import main

if __name__ == "__main__":
    main(TrainAnnotator, "python -m cwpo_trainer.train_annotator")
