"""Policy: which lists to move, in what order, until the query arrives."""
