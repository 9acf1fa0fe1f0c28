"""The commands of `fastsdpo`, a module each: options and what is printed; the work is done by the other folders."""
