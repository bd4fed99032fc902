"""The command line: flags become objects. Only the verbs that run a model import torch."""
