"""What is around the sampling loop: the arguments, LoRAs beside the mask's, editing a photo."""
