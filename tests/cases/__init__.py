"""The cases of every op, and the check that runs one of them on a target: a file per op."""
