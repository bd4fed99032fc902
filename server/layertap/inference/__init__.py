"""The generated messages of the Open Inference Protocol; ``proto/inference`` is their source."""
