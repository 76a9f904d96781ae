"""What happened: answers drawn from a language model, episodes of an environment."""
