"""The build cache: what each stage of a build made, under a digest of everything it was made from."""
