"""The protocol: pure, measured into the enclave image, imports nothing of ours."""
