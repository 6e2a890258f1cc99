"""What every part stands on: the batch contract, options, errors, files, seeds, logging, distributed helpers."""
