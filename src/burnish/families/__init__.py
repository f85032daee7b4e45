"""Model families: one file each, named in `registry`. What several share has its own modules."""
