"""One file per verb: read the options, call one function, save, say in one line where."""
