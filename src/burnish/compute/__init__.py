"""How the denoiser is computed: attention kernels, compiled blocks, what the machine can do."""
