"""Fast normalisation and neurons: in C++ on CPUs, in Triton on GPUs."""
