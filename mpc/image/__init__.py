"""Enclave images: build, read and measure EIF files; the lists of what is in them."""
