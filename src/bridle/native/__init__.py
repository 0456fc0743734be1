"""Opens what rooms hold in C, compiled on installing where there is a C compiler, if it is of the present source."""
