"""The enclave: everything here is measured, synchronous, and trusted by strangers."""
