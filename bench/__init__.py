"""ssd-bench: benchmarks of ssd_kernels and ssd_janus. Nothing here is imported by the libraries."""
