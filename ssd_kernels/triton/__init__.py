"""Triton kernels and their host side. Imported late: `import ssd_kernels` needs torch only."""
