"""`epd-serve`: the entrypoint of the images. Standard library only, as it runs before and beside everything else."""
