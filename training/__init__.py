"""How the weights that ship with isthmus were trained. Not part of the package: run it from the repository, `python -m training.digits`."""
