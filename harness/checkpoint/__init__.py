"""What the files of a model hold, read from headers under bounds."""
