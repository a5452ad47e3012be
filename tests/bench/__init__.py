"""`make bench`: the goals of the project, measured."""
