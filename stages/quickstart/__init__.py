"""The whole way on the bundled target, from its states to drafts compared, by the commands that a user would type."""
