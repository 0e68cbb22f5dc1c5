"""`evalcache ui`: the report served on this machine alone, for reading, with a box for SQL."""
