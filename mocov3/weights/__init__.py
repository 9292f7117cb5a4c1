"""Files of weights: ours, read and written; others', recognised and converted. Nothing in a file is run."""
