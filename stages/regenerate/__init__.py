"""`pipeline regenerate`: a corpus in which every reply is the target's own."""
