"""Products of rows with the matrix of each row's group, for mixtures of experts."""
