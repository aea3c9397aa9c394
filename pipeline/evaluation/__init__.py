"""What drafts are worth: the accept length, reports, and drafts compared."""
