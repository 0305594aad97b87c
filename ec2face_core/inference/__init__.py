"""What is around the sampling loop: arguments, LoRAs beside the mask's, consistency guidance."""
