"""Which architectures of the installed libraries are explained: made by building a tiny one of each and running it."""
