"""What several papers share: credit assignment, preference objectives, wrappers of an Algorithm, controllers."""
