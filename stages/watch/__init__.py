"""`pipeline watch`: the progress of a run, a sweep or a capture, from another terminal."""
