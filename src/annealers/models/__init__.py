"""Networks that Diffusers lacks."""
