"""`pipeline recode`: rewrite columns of a cache in another codec, without the target."""
