"""What trainings read: labelled pairs, the weighted dataset, prompts."""
