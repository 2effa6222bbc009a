"""Windows as tiles of tokens: what the kernels of both attentions are made of, by platform."""
