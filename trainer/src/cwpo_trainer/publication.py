"""Uploading an annotator, or a weighted dataset, to the Hub."""

from __future__ import annotations

from cwpo.datasets.folder import dataset_files
from cwpo.datasets.triplets import readable
from cwpo_annotator.checkpoint import CARD_NAME, CheckpointError, read_card
from cwpo_trainer import hub
from cwpo_trainer.cards.dataset_card import dataset_card
from cwpo_trainer.settings.uploads import AnnotatorPublication, DatasetPublication


def push_annotator(settings: AnnotatorPublication) -> None:
    """Upload the folder of an annotator, with the card that its training wrote.

    Raises: CheckpointError, ConfigError, or CwpoError where the upload fails.
    """
    if read_card(settings.annotator) is None:
        raise CheckpointError(
            f"{settings.annotator}: not a folder that `cwpo train-annotator` wrote: it has no "
            f"{CARD_NAME}"
        )
    hub.check(settings.repository, "REPOSITORY")
    hub.push(settings.annotator, settings.repository)
    print(f"https://huggingface.co/{settings.repository}")


def push_dataset(settings: DatasetPublication) -> None:
    """Upload the files of a weighted dataset, with a card.

    Raises: DatasetError, ConfigError, or CwpoError where the upload fails.
    """
    files = [*map(readable, dataset_files(settings.data))]
    hub.check(settings.repository, "REPOSITORY")
    card = dataset_card(settings.data, files, settings.repository, settings.license)
    hub.push_dataset(files, card, settings.repository)
    print(f"https://huggingface.co/datasets/{settings.repository}")
