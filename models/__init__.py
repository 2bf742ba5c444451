"""Small models in plain Pyro, each with its data and its referees."""
