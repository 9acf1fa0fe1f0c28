"""The commands of `fastsdpo`: argument definitions and printing; the work is done in the library."""
