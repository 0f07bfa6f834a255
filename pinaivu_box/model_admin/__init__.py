"""What operators do with the models of a running box, whichever way they ask for it."""
