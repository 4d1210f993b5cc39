"""What two or more models share: networks, likelihoods, priors on parameters."""
