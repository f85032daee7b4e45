"""Pictures and captions in, batches of cached latents and conditioning out."""
