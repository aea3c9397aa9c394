"""An export served by a real engine on this machine, and what it gains compared with what `evaluate` says."""
