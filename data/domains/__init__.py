"""What the target can do: each function draws one conversation's turns."""
