"""What `make` runs on the host: standard library only, so that a fresh machine needs nothing but Python 3.9."""
