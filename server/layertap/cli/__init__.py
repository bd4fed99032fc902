"""The command line. Only commands that run a model import torch."""
