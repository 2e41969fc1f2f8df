"""Images: finding, decoding and cropping them, and batches of them."""
