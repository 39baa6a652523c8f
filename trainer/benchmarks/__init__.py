"""The measurements of trainer.benchmark."""
