"""Where negatives come from: the whole training set, encoded, searched, and drawn from with the pairs (AOQ)."""
