"""Where negatives come from: a queue of earlier pairs, embedded by a slow copy, and a draw that avoids false ones (FNE)."""
